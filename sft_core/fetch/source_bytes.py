"""The bytes of a source's file, hashed while they are read: what is parsed is what was described.

In: a source and one of its files, on any file system. Out: its bytes in pieces, or a local copy; a SourceError after
the last byte where the file is no longer the one described.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, cast

from fsspec.core import url_to_fs

from sft_core.errors import SourceError
from sft_core.fetch.compression import compression_of, decompress, naming_damage
from sft_core.fetch.formats import named_lines
from sft_core.fetch.json_rows import json_layout
from sft_core.fetch.source import SourceFile
from sft_core.fingerprint import CHUNK_BYTES


def copy_file(source: str, file: SourceFile, folder: Path) -> Path:
    """A local copy under the file's own base name."""
    copy = folder / PurePosixPath(file.path).name
    with copy.open("wb") as local:
        local.writelines(_pieces(source, file))
    return copy


def plain_pieces(source: str, file: SourceFile, folder: Path) -> Iterator[bytes]:
    """What is in the file, below any compression. A compressed one is copied to `folder` first: a zip is not read from
    front to back."""
    if compression_of(file.label) is None:
        yield from _pieces(source, file)
        return
    copy = copy_file(source, file, folder)
    with naming_damage(file.label), copy.open("rb") as packed, decompress(packed, copy.name) as plain:
        while piece := plain.read(CHUNK_BYTES):
            yield piece


def holds_json_lines(source: str, file: SourceFile) -> bool:
    """Whether the file's beginning tells JSON Lines."""
    if file.format != "json":
        return False
    with _open(source, file) as packed, naming_damage(file.label), decompress(packed, file.label) as plain:
        return json_layout(plain, named_lines(file.label))[0] == "lines"


def _pieces(source: str, file: SourceFile) -> Iterator[bytes]:
    digest = hashlib.sha256()
    with _open(source, file) as reader:
        while piece := reader.read(CHUNK_BYTES):
            digest.update(piece)
            yield piece
    if digest.hexdigest() != file.sha256:
        raise SourceError(f"{file.label} (of {source}) changed while it was being read; run again")


def _open(source: str, file: SourceFile) -> IO[bytes]:
    try:
        fs, _ = url_to_fs(source)
        return cast(IO[bytes], fs.open(file.path, "rb"))
    except Exception as error:  # noqa: BLE001 - every file system raises errors of its own
        raise SourceError(f"{file.label}: cannot be opened: {type(error).__name__}: {error}") from error
