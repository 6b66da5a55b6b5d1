"""Resumable state by holder of the training's lease: each writes to a folder of its own name, which nobody has again.

In: the training's folder of resumable state, the name of a lease. Out: that holder's folder, with what the last one
left. Whoever was suspended while it lost the lease, and goes on, writes to a place that is gone: what its process or
its ranks still do reaches no file of the new holder, whatever they were about to do.
"""

import re
import shutil
from pathlib import Path

HOLDER = re.compile(r"\d{8}-[0-9a-f]{8}")
"""`sft_core.lease.Lease.name`."""


def holders(folder: Path) -> list[Path]:
    """The holders' folders, in the order in which they came."""
    return sorted(path for path in folder.glob("*") if HOLDER.fullmatch(path.name))


def newest_holder(folder: Path) -> Path:
    """The folder of the last holder; one that is not there, where there was none."""
    return max(holders(folder), default=folder / "none")


def take_over(folder: Path, name: str) -> Path:
    """The folder of the holder `name`, with the state of the last one before it; what still older ones left goes."""
    own = folder / name
    earlier = [path for path in holders(folder) if path.name < name]
    if not earlier:
        own.mkdir(parents=True, exist_ok=True)
        return own
    earlier.pop().rename(own)  # at once or not at all, and its earlier holder has no path to it any more
    for log in own.glob("*.log"):  # but it may have them open
        part = log.with_suffix(".part")
        shutil.copyfile(log, part)
        part.replace(log)
    for path in earlier:
        shutil.rmtree(path, ignore_errors=True)
    return own
