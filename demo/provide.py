"""The demo's base model, made where it is missing: `sft run demo` works in any folder, not only in a checkout."""

import time
from pathlib import Path

from sft_core.file_lock import file_lock
from sft_core.terminal import say

BASE_MODEL = Path(".demo/base")


def provide_base_model(path: str) -> None:
    """Make the base model if `path` is the demo's and nothing is there; one process makes it, others wait for it."""
    if Path(path) != BASE_MODEL or BASE_MODEL.exists():
        return
    with file_lock(BASE_MODEL.with_name("base.lock")):
        if not BASE_MODEL.exists():
            _make()


def _make() -> None:
    from demo.base_model import make_base_model

    say("making a tiny base model: pretraining it on plain text (about 20 s)", to_stderr=True)
    clock = time.monotonic()
    unfinished = BASE_MODEL.with_name("base.unfinished")
    make_base_model(unfinished)
    unfinished.rename(BASE_MODEL)
    say(f"made {BASE_MODEL} in {time.monotonic() - clock:.0f} s", to_stderr=True)
