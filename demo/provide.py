"""The demo's base model, made where it is missing: `sft run demo` works in any folder, not only in a checkout."""

import os
import sys
import time
from pathlib import Path

from sft_core.file_lock import file_lock

BASE_MODEL = Path(".demo/base")


def provide_base_model(path: str) -> None:
    """Make the base model if `path` is the demo's and nothing is there; one process makes it, others wait for it."""
    if Path(path) != BASE_MODEL or BASE_MODEL.exists():
        return
    with file_lock(BASE_MODEL.with_name("base.lock")):
        if not BASE_MODEL.exists():
            _make()


def _make() -> None:
    import torch

    from demo.base_model import make_base_model

    print("making a tiny base model: pretraining it on plain text (about 20 s)", file=sys.stderr, flush=True)
    clock, threads = time.monotonic(), torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    unfinished = BASE_MODEL.with_name("base.unfinished")
    try:
        make_base_model(unfinished)
    finally:
        torch.set_num_threads(threads)
    unfinished.rename(BASE_MODEL)
    print(f"made {BASE_MODEL} in {time.monotonic() - clock:.0f} s", file=sys.stderr, flush=True)
