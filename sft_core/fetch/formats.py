"""Which format a file has: by its first bytes where they tell, else by its name.

In: a file's name and first bytes, or a local copy of it. Out: `json`, `csv`, `parquet` or `arrow`, and its rows.
"""

import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import fsspec
import pyarrow as pa
from fsspec.utils import infer_compression

from sft_core.errors import SourceError
from sft_core.fetch.json_rows import RawRow, read_json
from sft_core.fetch.table_rows import read_arrow, read_csv, read_parquet

FORMAT_OF_SUFFIX = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
SUFFIXES = frozenset(FORMAT_OF_SUFFIX)


def plain_suffix(name: str) -> str:
    """The suffix below a compression's.

    >>> plain_suffix("train.JSONL.gz")
    '.jsonl'
    """
    path = PurePosixPath(name)
    return (path.with_suffix("") if infer_compression(path.name.lower()) else path).suffix.lower()


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
    raise SourceError(
        f"{label}: unknown format; data files end in {', '.join(sorted(SUFFIXES))}, or begin with {{ or ["
    )


def read_rows(path: Path, format_: str, label: str) -> Iterator[RawRow]:
    """Rows of a local file, which keeps the suffixes of its name. SourceError when it is broken as a whole."""
    try:
        with fsspec.open(str(path), "rb", compression="infer") as file:
            if format_ == "csv":
                yield from read_csv(file, label)
            elif format_ == "parquet":
                yield from read_parquet(file)
            elif format_ == "arrow":
                yield from read_arrow(file)
            else:
                yield from read_json(file, label, plain_suffix(label) in (".jsonl", ".ndjson"))
    except (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException) as error:
        raise SourceError(
            f"{label}: damaged, or cut short: {type(error).__name__}: {error}; fetch or write the file again"
        ) from error
