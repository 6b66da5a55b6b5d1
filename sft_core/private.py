"""Folders of this user alone, in the machine's temporary folder, under names that anyone can guess.

In: a name. Out: a folder that nobody else can enter; one that somebody else made, or could have written to, is an error
and not used: what lies there is read, and some of it (a checkpoint's optimizer state) is run.
"""

import contextlib
import os
import stat
import tempfile
from pathlib import Path

from sft_core.errors import StoreError

OTHERS = 0o077
WRITTEN_BY_OTHERS = 0o022


def private_folder(name: str) -> Path:
    """`$TMPDIR/NAME-UID`, with mode 0700. StoreError if it is a link, another user's, or open to others' writing."""
    path = Path(tempfile.gettempdir()) / f"{name}-{os.geteuid()}"
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & WRITTEN_BY_OTHERS:
        raise StoreError(
            f"{path}: not a folder of this user alone (owner {found.st_uid}, mode {stat.filemode(found.st_mode)}), so "
            "others may have put files there; remove it, or set TMPDIR to a folder of your own"
        )
    if found.st_mode & OTHERS:
        path.chmod(0o700)
    return path
