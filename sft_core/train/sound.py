"""Which checkpoint may be gone on from: the newest one whose every byte is what was written, and no program.

In: a folder of checkpoints. Out: the checkpoint; damaged ones are deleted, with a line each, so that none is met again
and again. DeepSpeed unpickles its files without a bound on what they name: they are read as data first, by
`sft_core.convert.reader`, which refuses what could run. The Trainer's own are loaded as tensors only (`weights_only`).
"""

import shutil
from collections.abc import Callable
from pathlib import Path

from sft_core.errors import ModelError
from sft_core.store_cache import list_files
from sft_core.train.best import best_in
from sft_core.train.checkpoints import COMPLETE, newest_complete, read_mark

DEEPSPEED = "global_step*/**/*.pt"
"""What DeepSpeed unpickles."""


def newest_sound(folder: Path, on_line: Callable[[str], None], with_best: bool = False) -> Path | None:
    """The newest complete checkpoint that is not damaged; None if there is none. `with_best`: that of its best
    evaluation, which may become the result, has to be there and sound as well. Reads every byte."""
    while (newest := newest_complete(folder)) is not None:
        fault = damage(newest) or (best_damage(newest) if with_best else None)
        if fault is None:
            return newest
        (newest / COMPLETE).unlink()  # half a deletion must not look complete
        shutil.rmtree(newest)
        on_line(f"note: {fault}; {newest.name} is passed over and deleted, the one before it is taken if there is one")
    return None


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, naming the first such file; None if nothing is."""
    mark = read_mark(checkpoint)
    if mark is None:
        return f"{checkpoint}: not complete"
    there = list_files(checkpoint)
    there.pop(COMPLETE, None)
    for name in sorted({*mark.files, *there}):
        if mark.files.get(name) != there.get(name):
            return f"{checkpoint / name}: its bytes are not those that were written"
    return _program(sorted(checkpoint.glob(DEEPSPEED)))


def best_damage(checkpoint: Path) -> str | None:
    """The same of the checkpoint of its best evaluation, which lies beside it."""
    best = best_in(checkpoint)
    beside = checkpoint.with_name(f"checkpoint-{best.optimizer_step}") if best is not None else checkpoint
    return damage(beside) if beside != checkpoint else None


def _program(paths: list[Path]) -> str | None:
    if not paths:
        return None
    from sft_core.convert.reader import read_pickle  # imports torch

    try:
        for path in paths:
            read_pickle(path)
    except ModelError as error:
        return str(error)
    return None
