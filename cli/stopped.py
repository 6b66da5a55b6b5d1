"""How a command ends that was stopped: one line that says what was reached, its exit status, and nothing more.

In: `sft_core.stop`. Out: 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP. What must be done on the way out (a
training saves, runs in MLflow and Prefect are ended, temporary files go) is done by whoever unwinds, or within
EXIT_SECONDS at exit; a stop that takes longer than LIMIT_SECONDS ends the process as it is.
"""

import atexit
import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from cli.environment import debugging
from sft_core import stop
from sft_core.terminal import say

LIMIT_SECONDS = 8.0
"""From the signal to the command's last line. A training that saves may take longer (`sft_core.steps`)."""
EXIT_SECONDS = 5.0
"""From there to the prompt: Prefect sends what it still has to say."""
SLOW_SECONDS = 1.0
"""After so long a person is told that something happens."""
_ended: list[int] = []
"""The exit status, once the last line is out."""
_slow: list[threading.Timer] = []
"""What tells them so, for each stop that was asked for."""


def begin() -> None:
    """For a command, before it imports much."""
    atexit.register(_leave)  # the first to be registered is the last to be called
    stop.listen(LIMIT_SECONDS, _hear)


def go_on() -> None:
    """The stop was meant for something smaller than the command, and has been done."""
    while _slow:
        _slow.pop().cancel()
    stop.withdraw()
    logging.disable(logging.NOTSET)


@contextlib.contextmanager
def telling(reached: Callable[[], str]) -> Iterator[None]:
    """If the block is stopped, the command ends here, with what was `reached`."""
    try:
        yield
    except BaseException:  # whatever a stop became on its way
        if stop.asked() is None:
            raise
        end(reached())


def end(reached: str) -> NoReturn:
    """Say it, and leave: whatever libraries print from here on reaches nobody."""
    number = stop.asked() or signal.SIGINT
    stop.unwound(EXIT_SECONDS)
    if not _ended:
        with contextlib.suppress(OSError):
            line_break = "\n" if sys.stderr.isatty() else ""
            say(f"{line_break}stopped{reached and ' '}{reached}", to_stderr=True)
        _ended.append(stop.status(number))
        if not debugging():
            _silence(1, 2)
    raise SystemExit(_ended[0])


def _hear(number: int) -> None:
    if number == signal.SIGHUP:
        _silence(*(descriptor for descriptor in (1, 2) if os.isatty(descriptor)))  # the terminal is gone
    if not debugging():
        logging.disable(logging.CRITICAL)
    said = threading.Timer(SLOW_SECONDS, _say_stopping)
    said.daemon = True
    _slow.append(said)
    said.start()


def _say_stopping() -> None:
    if not _ended and stop.asked() is not None:
        with contextlib.suppress(OSError):
            os.write(2, b"\nstopping; Ctrl-C again ends it at once\n" if os.isatty(2) else b"stopping\n")


def _silence(*descriptors: int) -> None:
    with open(os.devnull, "wb") as nothing:  # noqa: PTH123 - a device, not a path of anyone's
        for descriptor in descriptors:
            os.dup2(nothing.fileno(), descriptor)


def _leave() -> None:
    """Libraries' threads at work in C++ abort a process that is torn down around them (status 134)."""
    if _ended:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(_ended[0])


def reached_in(recipe: Any, plan: Any) -> str:
    """How far a retraining got, as the store has it, and what becomes of that."""
    from sft_core.store import Store
    from sft_core.train.checkpoints import complete_checkpoints, planned_steps, step_of
    from sft_core.train.holders import newest_holder

    store = Store(recipe.store)
    done = [key for key, step in plan.steps.items() if store.find(step.step, step.fingerprint) is not None]
    missing = [key for key in plan.steps if key not in done]
    if not missing:
        return "before register was done; every step before it is done and reused: the same command goes on"
    if missing[0] == "train":
        saved = complete_checkpoints(newest_holder(store.work_in_progress("train", plan["train"].fingerprint)))
        newest = max(saved, key=step_of, default=None)
        if newest is not None:
            total = planned_steps(newest)
            return f"at optimizer step {step_of(newest)} of {total}, saved; the same command goes on"
    kept = f" {', '.join(done)} done and reused:" if done else ""
    return f"before {missing[0]} was done;{kept} the same command goes on"
