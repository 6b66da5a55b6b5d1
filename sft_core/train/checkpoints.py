"""Resumable state on disk: Trainer's `checkpoint-N` folders, each with a mark that says it was written whole."""

import re
import shutil
from pathlib import Path

COMPLETE = "complete"
"""Empty file, written last into a checkpoint."""


def mark_complete(checkpoint: Path) -> None:
    """Say that every byte of `checkpoint` is there."""
    (checkpoint / COMPLETE).touch()


def newest_complete(folder: Path) -> Path | None:
    """The complete checkpoint of the highest optimizer step; torn ones (a kill while saving) are deleted."""
    complete: list[tuple[int, Path]] = []
    for checkpoint in folder.glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", checkpoint.name)
        if match is None:
            continue
        if (checkpoint / COMPLETE).exists():
            complete.append((int(match.group(1)), checkpoint))
        else:
            shutil.rmtree(checkpoint)
    return max(complete)[1] if complete else None


def step_of(checkpoint: Path) -> int:
    """The optimizer step a checkpoint was saved after."""
    return int(checkpoint.name.removeprefix("checkpoint-"))
