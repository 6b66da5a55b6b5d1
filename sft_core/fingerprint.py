"""SHA-256 of what decides an artifact's content, and of nothing else.

In: plain values and files. Out: 64 hex digits, equal on every machine (DESIGN 3).
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

CHUNK_BYTES = 1 << 20


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


def hash_folder(folder: Path, names: Iterable[str] | None = None) -> dict[str, str]:
    """Fingerprint of each file below `folder` (or of `names` only), by relative path."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and ".git" not in p.parts)
    wanted = None if names is None else set(names)
    relative = {p.relative_to(folder).as_posix(): p for p in paths}
    return {name: hash_file(path) for name, path in relative.items() if wanted is None or name in wanted}
