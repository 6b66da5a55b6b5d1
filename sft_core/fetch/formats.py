"""Which format a file has: by its first bytes where they tell, else by its name.

In: a file's name and first bytes, or a local copy of it. Out: `json`, `csv`, `parquet` or `arrow`, and its rows.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

from sft_core.errors import SourceError
from sft_core.fetch.arrow_rows import read_arrow, read_parquet
from sft_core.fetch.compression import COMPRESSION_OF_SUFFIX, compression_of, decompress, naming_damage, plain_suffix
from sft_core.fetch.expansion import Expansion
from sft_core.fetch.json_rows import RawRow, read_json
from sft_core.fetch.table_rows import read_csv
from sft_core.fingerprint import CHUNK_BYTES

FORMAT_OF_SUFFIX = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
SUFFIXES = frozenset(FORMAT_OF_SUFFIX)
READABLE = f"{', '.join(sorted(SUFFIXES))}, also with {', '.join(sorted(COMPRESSION_OF_SUFFIX))}"


def detect_format(head: bytes, label: str) -> str:
    """Format of a file that begins with `head`. JSON arrays and JSON Lines are told apart when they are read."""
    if head.startswith(b"version https://git-lfs"):
        raise SourceError(f"{label}: a Git LFS pointer, not the data; run `git lfs pull` where it lies")
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise SourceError(f"{label}: UTF-16 text; convert it: iconv -f UTF-16 -t UTF-8 {label} > NEW_FILE")
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith((b"ARROW1", b"\xff\xff\xff\xff")):  # file and stream layout
        return "arrow"
    by_name = FORMAT_OF_SUFFIX.get(plain_suffix(label))
    if by_name in ("parquet", "arrow"):
        raise SourceError(
            f"{label}: named {by_name}, but its first bytes are {head[:8]!r}; fetch it again or rename it"
        )
    if by_name:
        return by_name
    if head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"{", b"["):
        return "json"
    raise SourceError(f"{label}: unknown format; data files end in {READABLE}, or begin with {{ or [")


def read_rows(path: Path, format_: str, label: str) -> Iterator[RawRow]:
    """Rows of a local file, which keeps the suffixes of its name. SourceError when it is broken as a whole, or its rows
    are far more than a file of its size can hold."""
    expansion = Expansion(path.stat().st_size, label)
    for raw in _rows(path, format_, label):
        expansion.add(len(raw.row))
        yield raw


def _rows(path: Path, format_: str, label: str) -> Iterator[RawRow]:
    with naming_damage(label):
        if format_ in ("parquet", "arrow"):
            plain = _plain_copy(path)
            yield from (read_parquet if format_ == "parquet" else read_arrow)(plain, label)
            return
        with path.open("rb") as packed, decompress(packed, path.name) as file:
            if format_ == "csv":
                yield from read_csv(file, label)
            else:
                yield from read_json(file, label, named_lines(label))


def named_lines(label: str) -> bool:
    """Whether the name says JSON Lines."""
    return plain_suffix(label) in (".jsonl", ".ndjson")


def _plain_copy(path: Path) -> Path:
    """The file without its compression, beside it: Parquet and Arrow files are not read from front to back."""
    if compression_of(path.name) is None:
        return path
    plain = path.with_name(f"{path.name}.plain")
    with path.open("rb") as packed, decompress(packed, path.name) as file, plain.open("wb") as copy:
        shutil.copyfileobj(file, copy, CHUNK_BYTES)
    return plain
