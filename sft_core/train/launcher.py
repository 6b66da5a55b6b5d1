"""A rank whose launcher is silent ends itself: nobody else could end it, and another training may begin.

In: the signs of life of the process that started this machine's ranks. Out: none of them trains on for long behind a
process that is stopped (Ctrl-Z, SIGSTOP, a debugger) and lets its lease run out. A machine that stood still as a whole
tells by the lease alone: a rank's own pause counts for nobody.
"""

import json
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from sft_core.train.ranks import PAUSE_SECONDS, Beat

LAST_WORDS_SECONDS = 5.0
"""For a line to a pipe that nobody may be reading."""


def launcher_name(node_rank: int | str) -> str:
    """Name of its beats, beside those of its ranks."""
    return f"launcher-{node_rank}"


def launcher_of(environment: Mapping[str, str]) -> str:
    """The same, as a rank knows it: torchrun tells it the number of the node; without it a rank is a node."""
    return launcher_name(environment.get("GROUP_RANK", environment.get("RANK", "0")))


def end_without(path: Path, seconds: float, fault: str) -> None:
    """From a thread: end this process once the beats in `path` have stood still for `seconds`. Nothing happens where
    there are none: a rank that was started by hand."""
    if Beat.read(path) is not None:
        threading.Thread(target=_watch, args=(path, seconds, fault), name="launcher", daemon=True).start()


def _watch(path: Path, seconds: float, fault: str) -> None:
    last, changed = Beat.read(path), time.monotonic()
    looked = changed
    while time.monotonic() - changed <= seconds:
        time.sleep(min(1.0, seconds / 10))
        now, beat = time.monotonic(), Beat.read(path)
        if beat != last or now - looked > PAUSE_SECONDS:
            last, changed = beat, now
        looked = now
    last_words = threading.Timer(LAST_WORDS_SECONDS, os._exit, (1,))
    last_words.daemon = True
    last_words.start()
    message = (
        f"the process that started this training was silent for {seconds:.0f} s (stopped, or out of time), and the "
        "ranks ended themselves; the same command goes on from the newest checkpoint"
    )
    os.write(1, f"{fault}{json.dumps(message)}\n".encode())
    os._exit(1)
