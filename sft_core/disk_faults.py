"""A machine's own faults in one line: a full or read-only disk, a missing right, a name that is too long.

In: any exception of any library. Out: what happened, where, what to do; or None for what is no such fault. Network
errors are OSErrors too: only the numbers below are the machine's.
"""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from sft_core.errors import DiskError, SftError

ADVICE = {
    errno.ENOSPC: "free some space there, or name another disk (`store:`, TMPDIR)",
    errno.EDQUOT: "free some of your quota, or name another disk (`store:`, TMPDIR)",
    errno.EFBIG: "raise the limit on a file's size (ulimit -f), or name another disk (`store:`, TMPDIR)",
    errno.EROFS: "name a place that can be written to",
    errno.EACCES: "get the right to it, or name another place",
    errno.EPERM: "get the right to it, or name another place",
    errno.ENAMETOOLONG: "give it a shorter name",
    errno.EIO: "the disk fails: look at it, or name another one",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "raise the machine's limit on open files",
}
TOLD = re.compile(r"(?:os error |errno )(\d+)", re.IGNORECASE)
"""How libraries in Rust and C++ pass the number on."""


def disk_fault(error: BaseException | None, place: str = "") -> str | None:
    """`/x/y: No space left on device; free ...`, for the first such fault among an error and its causes. `place`: where
    it happened, if the error does not say."""
    while error is not None:
        number = _number(error)
        if number in ADVICE:
            where = _where(error) or place
            return f"{where}{': ' if where else ''}{os.strerror(number)}; {ADVICE[number]}"
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None


@contextmanager
def naming_disk_faults(what: str, place: str = "") -> Iterator[None]:
    """DiskError that names `what` in place of any such fault inside. `place` as of `disk_fault`."""
    try:
        yield
    except SftError:
        raise
    except Exception as error:
        words = disk_fault(error, place)
        if words is None:
            raise
        raise DiskError(f"{what}: {words}") from error


def _where(error: BaseException) -> str:
    """The file that an error names: of a copy the one that was written."""
    for name in (getattr(error, "filename2", None), getattr(error, "filename", None)):
        if isinstance(name, str | bytes):
            return os.fsdecode(name)[:200]
    return ""


def _number(error: BaseException) -> int | None:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    told = TOLD.search(str(error)[:2000])
    if told:
        return int(told[1])
    return errno.ENOSPC if os.strerror(errno.ENOSPC) in str(error)[:2000] else None
