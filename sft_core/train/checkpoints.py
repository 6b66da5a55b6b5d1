"""Resumable state on disk: Trainer's `checkpoint-N` folders, each with a mark that says it was written whole.

The mark `complete` is JSON: size and SHA-256 of every file, how many ranks wrote, and what was counted so far. It is
written last, after every file has reached the disk; a folder with files of other sizes counts as torn. What a run goes
on from, or gives as its result, is read once more and compared with the hashes (`sound.py`).
"""

import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from sft_core.artifacts import StoredFile
from sft_core.store_cache import list_files

COMPLETE = "complete"
"""The mark's file, written last into a checkpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What a run has trained so far, all ranks together."""

    tokens: int = 0
    supervised_tokens: int = 0
    skipped_steps: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """What `complete` holds. `files`: by path in the checkpoint. `micro_batches`: of an optimizer step, all ranks
    together; 0 where it was not noted yet. `rows_at_once` and `checkpoint_every`: of a micro-batch, and where
    activations were recomputed (0: nowhere, n: every n-th layer), where the recipe left them to the run; else 0."""

    world_size: int
    counts: Counts
    files: dict[str, StoredFile]
    micro_batches: int = 0
    rows_at_once: int = 0
    checkpoint_every: int = 0


def mark_complete(
    checkpoint: Path, world_size: int, counts: Counts, micro_batches: int = 0, chosen: tuple[int, int] = (0, 0)
) -> None:
    """Say that every byte of `checkpoint` is there. `chosen`: the mark's `rows_at_once` and `checkpoint_every`."""
    for path in checkpoint.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    rows, every = chosen
    parts = {"micro_batches": micro_batches, "rows_at_once": rows, "checkpoint_every": every}
    mark = Mark(world_size=world_size, counts=counts, files=list_files(checkpoint), **parts)
    part = checkpoint / f"{COMPLETE}.part"
    with part.open("w", encoding="utf-8") as file:
        json.dump(asdict(mark), file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    part.replace(checkpoint / COMPLETE)


def read_mark(checkpoint: Path) -> Mark | None:
    """The mark, or None if the checkpoint is torn: no mark, half a mark, or files that are not of the size it says."""
    try:
        value = json.loads((checkpoint / COMPLETE).read_text("utf-8"))
        counts = Counts(**value["counts"])
        files = {str(name): StoredFile(**entry) for name, entry in value["files"].items()}
        parts = {name: int(value.get(name, 0)) for name in ("micro_batches", "rows_at_once", "checkpoint_every")}
        mark = Mark(world_size=int(value["world_size"]), counts=counts, files=files, **parts)
        whole = all((checkpoint / name).stat().st_size == entry.size for name, entry in mark.files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return mark if whole else None


def newest_complete(folder: Path) -> Path | None:
    """The complete checkpoint of the highest optimizer step; torn ones (a kill while saving) are deleted."""
    complete = []
    for checkpoint in _checkpoints(folder):
        if read_mark(checkpoint) is None:
            shutil.rmtree(checkpoint)
        else:
            complete.append(checkpoint)
    return max(complete, key=step_of, default=None)


def complete_checkpoints(folder: Path) -> list[Path]:
    """All complete checkpoints, in no order; torn ones stay: they may be being written."""
    return [checkpoint for checkpoint in _checkpoints(folder) if read_mark(checkpoint) is not None]


def keep_newest(folder: Path, number: int, also: int | None = None) -> None:
    """Delete all but the newest `number` complete checkpoints, and that of the optimizer step `also`."""
    complete = [checkpoint for checkpoint in _checkpoints(folder) if (checkpoint / COMPLETE).exists()]
    for checkpoint in sorted(complete, key=step_of)[:-number]:
        if step_of(checkpoint) == also:
            continue
        (checkpoint / COMPLETE).unlink()  # half a deletion must not look complete
        shutil.rmtree(checkpoint)


def counts_of(checkpoint: Path) -> Counts:
    """What was counted up to `checkpoint`, which is complete."""
    mark = read_mark(checkpoint)
    assert mark is not None, "only complete checkpoints come here"
    return mark.counts


def step_of(checkpoint: Path) -> int:
    """The optimizer step a checkpoint was saved after."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def planned_steps(checkpoint: Path) -> int:
    """How many optimizer steps the whole training has."""
    return int(json.loads((checkpoint / "trainer_state.json").read_text("utf-8"))["max_steps"])


def _checkpoints(folder: Path) -> list[Path]:
    return [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
