"""SHA-256 of what decides an artifact's content, and of nothing else.

In: plain values and files. Out: 64 hex digits, equal on every machine (DESIGN 3).
"""

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path

CHUNK_BYTES = 1 << 20
SETTLED_SECONDS = 2.0
_HASHES: dict[tuple[int, ...], str] = {}


def canonical_json(value: object) -> str:
    """JSON with sorted keys and no white space: equal values give equal text."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def hash_value(value: object) -> str:
    """Fingerprint of a JSON-able value."""
    return hash_text(canonical_json(value))


def hash_text(text: str) -> str:
    """Fingerprint of a text, as UTF-8 (lone surrogates kept as they are)."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def hash_file(path: Path) -> str:
    """Fingerprint of a file's bytes; its name and times do not count."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def hash_file_once(path: Path) -> str:
    """As `hash_file`, but a file whose size, times and inode stay as they are is read once a process.

    The time of an inode's last change (ctime) cannot be set back, as mtime can. A file that changed within the last
    SETTLED_SECONDS is read each time: its next change may get the same time (Git's racy-git.txt).
    """
    before = _state(path)
    if before in _HASHES:
        return _HASHES[before]
    digest = hash_file(path)
    if _state(path) == before and abs(time.time() - path.stat().st_ctime) > SETTLED_SECONDS:
        _HASHES[before] = digest
    return digest


def hash_folder(
    folder: Path, wanted: Callable[[str], bool] = lambda _: True, hash_one: Callable[[Path], str] = hash_file
) -> dict[str, str]:
    """Fingerprint of each file below `folder` whose relative path is wanted, by that path."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and ".git" not in p.parts)
    relative = {p.relative_to(folder).as_posix(): p for p in paths}
    return {name: hash_one(path) for name, path in relative.items() if wanted(name)}


def _state(path: Path) -> tuple[int, ...]:
    stat = path.stat()
    return (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
