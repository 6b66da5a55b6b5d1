"""Read `.pth`, `.pt` and `.bin` files that one need not trust: nothing in the file is executed, imported or inflated.

In: a zip file of torch.save. Out: its plain data; tensors are views of the mapped file, so only what is used later is
read. Source of the layout: `torch/serialization.py` (`data.pkl`, `data/N`, all stored without compression).
"""

import struct
import zipfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from sft_core.convert.names import DTYPES, Name, Refused, Storage
from sft_core.convert.opcodes import read_opcodes
from sft_core.errors import ModelError

MAX_PICKLE_BYTES = 256_000_000
"""Real ones have a few megabytes at most: the tensors' numbers are in files of their own."""
HEADER_BYTES = 30
"""Of a zip entry, its name aside."""


def read_pickle(path: Path) -> dict[str, Any]:
    """The file's data, tensors mapped from disk. ModelError naming the class it may not hold, or the torn file."""
    if not path.is_file():
        raise ModelError(f"{path}: no such file; the checkpoint is incomplete, take another one")
    try:
        data = _read(path)
    except Refused as error:
        raise ModelError(f"{path}: {error}; refused, nothing was executed. Take a checkpoint that you trust") from None
    except (zipfile.BadZipFile, OSError, struct.error, RuntimeError, EOFError, ValueError) as error:
        raise ModelError(
            f"{path}: torn, or not a zip file of torch.save ({error}); take another checkpoint. One in torch's format "
            "from before 1.6 must be loaded and saved again by the program that wrote it"
        ) from None
    if not isinstance(data, dict):
        raise ModelError(f"{path}: holds a {type(data).__name__} where a checkpoint holds a dict")
    return data


def _read(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        if len(entries) != len(archive.infolist()):
            raise Refused("the zip file has two entries of one name")
        for entry in entries.values():
            _check_entry(entry)
        places = sorted((entry.header_offset, entry.file_size) for entry in entries.values())
        if any(start + HEADER_BYTES + size > after for (start, size), (after, _) in pairwise(places)):
            raise Refused("two entries of the zip file lie over each other")
        pickles = [name for name in entries if PurePosixPath(name).name == "data.pkl"]
        if len(pickles) != 1:
            raise Refused(f"the zip file has {len(pickles)} data.pkl, a file of torch.save has one")
        if entries[pickles[0]].file_size > MAX_PICKLE_BYTES:
            raise Refused(f"data.pkl has {entries[pickles[0]].file_size:,} bytes, over {MAX_PICKLE_BYTES:,}")
        folder = pickles[0].removesuffix("data.pkl")
        if folder + "byteorder" in entries and archive.read(folder + "byteorder") != b"little":
            raise Refused("the numbers are not in little-endian order")
        text = archive.read(pickles[0])
    return read_opcodes(text, _Storages(path, folder, entries).load)


def _check_entry(entry: zipfile.ZipInfo) -> None:
    parts = PurePosixPath(entry.filename).parts
    if entry.filename.startswith("/") or ".." in parts or "\\" in entry.filename:
        raise Refused(f"the zip entry {entry.filename[:120]!r} points outside")
    if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
        raise Refused(f"the zip entry {entry.filename[:120]!r} is compressed, which torch.save never does")


@dataclass(slots=True)
class _Storages:
    """Resolves a persistent id to the numbers in the file."""

    path: Path
    folder: str
    entries: dict[str, zipfile.ZipInfo]
    mapped: torch.Tensor | None = None

    def load(self, identity: Any) -> Storage:
        match identity:
            case ("storage", Name(full=kind), str(key), str(), int(numel)) if kind in DTYPES:
                pass
            case _:
                raise Refused("a persistent id is something other than a storage")
        entry, dtype = self.entries.get(f"{self.folder}data/{key}"), DTYPES[kind]
        if entry is None or entry.file_size != numel * dtype.itemsize:
            raise Refused(f"storage {key[:20]!r} of {numel} {dtype} is missing or of another size: the file is torn")
        if numel == 0:
            return Storage(torch.empty(0, dtype=dtype))
        if self.mapped is None:
            size = self.path.stat().st_size
            self.mapped = torch.from_file(str(self.path), shared=False, size=size, dtype=torch.uint8)
        start = self._data_offset(entry)
        if start % dtype.itemsize or start + entry.file_size > len(self.mapped):
            raise Refused(f"storage {key[:20]!r} is not inside the file: the file is torn")
        return Storage(self.mapped[start : start + entry.file_size].view(dtype))

    def _data_offset(self, entry: zipfile.ZipInfo) -> int:
        """Behind the local header (30 bytes, name, padding)."""
        with self.path.open("rb") as file:
            file.seek(entry.header_offset)
            header = file.read(HEADER_BYTES)
        magic, name_length, extra_length = struct.unpack("<4s22xHH", header)
        if magic != b"PK\x03\x04":
            raise Refused("a zip entry has no local header: the file is torn")
        return entry.header_offset + HEADER_BYTES + int(name_length) + int(extra_length)
