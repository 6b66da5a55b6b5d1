"""One process of this machine at a time, by a lock on a file; the system frees it when its holder ends, however."""

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sft_core.errors import SftError

WAIT_SECONDS = 900.0
POLL_SECONDS = 0.1


class LockError(SftError):
    """Another process has held a lock for too long."""


@contextmanager
def file_lock(path: Path, wait_seconds: float = WAIT_SECONDS) -> Iterator[None]:
    """Held inside the block. The file stays, empty. LockError if others hold it for `wait_seconds`.

    Source: flock(2). Children do not inherit it: Python's files are closed when another program is started.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + wait_seconds
    with path.open("a") as file:
        while not _taken(file.fileno()):
            if time.monotonic() > deadline:
                raise LockError(f"{path}: held by another process for {wait_seconds:.0f} s; end it (fuser {path})")
            time.sleep(POLL_SECONDS)
        yield


def _taken(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
