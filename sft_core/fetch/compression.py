"""Compressed files, told by the last suffix of their name: .gz, .bz2, .xz, .lzma, .zst, .lz4, and .zip of one file.

In: a file's name, and the file opened in binary. Out: the plain bytes, as many as `bounds` allows. Zstandard and LZ4
are read by pyarrow, which reads several frames in a row, needs no further package and takes no window over 128 MiB. A
zip of several files is refused: unpack it to a folder.
"""

import bz2
import gzip
import lzma
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import IO, cast

import pyarrow as pa

from sft_core.errors import SourceError
from sft_core.fetch.expansion import bounded, xz_pieces

COMPRESSION_OF_SUFFIX = {
    ".gz": "gzip",
    ".bz2": "bz2",
    ".xz": "xz",
    ".lzma": "xz",
    ".zst": "zstd",
    ".lz4": "lz4",
    ".zip": "zip",
}
DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, pa.ArrowException, UnicodeDecodeError)
"""What broken bytes raise, below any compression or in Parquet and Arrow (whose columns' names must be UTF-8)."""
LONGEST_REASON = 300


def compression_of(name: str) -> str | None:
    """Name of the compression, or None.

    >>> compression_of("train.jsonl.ZST"), compression_of("train.jsonl")
    ('zstd', None)
    """
    return COMPRESSION_OF_SUFFIX.get(PurePosixPath(name).suffix.lower())


def plain_suffix(name: str) -> str:
    """The suffix below a compression's.

    >>> plain_suffix("train.JSONL.gz")
    '.jsonl'
    """
    path = PurePosixPath(name)
    return (path.with_suffix("") if compression_of(name) else path).suffix.lower()


def reason(error: Exception) -> str:
    """Type and beginning of a library's message, which may quote kilobytes of the file."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= LONGEST_REASON else f"{text[:LONGEST_REASON]}..."


@contextmanager
def naming_damage(label: str) -> Iterator[None]:
    """What broken bytes raise becomes a SourceError that names the file."""
    try:
        yield
    except DAMAGE as error:
        raise SourceError(f"{label}: damaged, or cut short: {reason(error)}; fetch or write the file again") from error


def decompress(file: IO[bytes], name: str) -> IO[bytes]:
    """`file` itself, or a reader of what is compressed in it."""
    plain: Callable[[int], bytes]
    match compression_of(name):
        case None:
            return file
        case "gzip":
            plain = gzip.GzipFile(fileobj=file, mode="rb").read1
        case "bz2":
            plain = bz2.BZ2File(file).read1
        case "xz":
            plain = xz_pieces(file)
        case "zip":
            plain = _only_member(file, name).read1
        case codec:
            plain = pa.CompressedInputStream(file, codec).read
    return bounded(plain, _size(file), name)


def _size(file: IO[bytes]) -> int:
    """Bytes of the file, which stays where it is."""
    at = file.tell()
    size = file.seek(0, os.SEEK_END)
    file.seek(at)
    return size


def _only_member(file: IO[bytes], name: str) -> zipfile.ZipExtFile:
    archive = zipfile.ZipFile(file)
    members = [m for m in archive.infolist() if not m.is_dir() and not m.filename.startswith("__MACOSX/")]
    if len(members) != 1:
        raise SourceError(f"{name}: a zip of {len(members)} files; unpack it and name the folder as the path")
    try:
        return cast(zipfile.ZipExtFile, archive.open(members[0]))
    except RuntimeError as error:  # encrypted, or a method that Python cannot read
        raise SourceError(f"{name}: {members[0].filename} in it cannot be read: {error}; unpack it yourself") from error
