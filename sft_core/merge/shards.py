"""The base's weight files as places on disk: nothing is read but headers.

In: `model.safetensors`, `pytorch_model.bin`, or shards of either with their index. Out: for each file its tensors in
the order they lie there, each with file, offset, dtype and shape. `.bin` files are pickles and are read as data only.
"""

import json
import math
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from sft_core.convert.reader import read_pickle
from sft_core.convert.writer import DTYPES, Slot
from sft_core.errors import ModelError

FORMATS = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
LET_GO_BYTES = 64 << 20
"""Of a mapped tensor what has been read is let go in pieces of this size; smaller ones cost more than they save."""
LFS = b"version https://git-lfs"
"""How the text begins that `git clone` leaves in place of a large file."""
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself


@dataclass(frozen=True, slots=True)
class Place:
    """A tensor of the base: `offset` bytes into `file`, rows one after the other."""

    file: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def slot(self, name: str) -> Slot:
        """The same tensor in an output file."""
        return Slot(name, self.dtype, self.shape)

    def read(self) -> torch.Tensor:
        """The whole tensor."""
        slot = self.slot("")
        data = torch.empty(slot.nbytes, dtype=torch.uint8)
        with self.file.open("rb", buffering=0) as file:
            read_into(file.fileno(), self.offset, data)
        return data.view(self.dtype).reshape(self.shape)

    @property
    def rows(self) -> tuple[int, int]:
        """The tensor as a matrix: (rows, columns)."""
        return (self.shape[0], math.prod(self.shape[1:])) if self.shape else (1, 1)

    def chunks(self, step: int) -> Iterator[tuple[int, torch.Tensor]]:
        """First row and rows, `step` at a time, mapped from the file: valid until the next."""
        height, width = self.rows
        start, nbytes = self.offset % mmap.PAGESIZE, self.slot("").nbytes
        if not nbytes:
            return
        with self.file.open("rb") as file:
            if os.fstat(file.fileno()).st_size < self.offset + nbytes:
                raise ModelError(f"base: {self.file} ends within a tensor; it changed while it was read")
            mapped = mmap.mmap(file.fileno(), start + nbytes, access=mmap.ACCESS_COPY, offset=self.offset - start)
        rows = torch.frombuffer(mapped, dtype=self.dtype, offset=start).view(height, width)
        let_go = 0
        for first in range(0, height, step):
            yield first, rows[first : first + step]
            seen = (start + min(first + step, height) * width * self.dtype.itemsize) // mmap.PAGESIZE * mmap.PAGESIZE
            if seen - let_go >= LET_GO_BYTES:
                mapped.madvise(mmap.MADV_DONTNEED, let_go, seen - let_go)
                let_go = seen


def read_into(descriptor: int, offset: int, data: torch.Tensor) -> None:
    """Fill `data` (bytes) from a file. ModelError if the file ends before."""
    view = data.numpy().data
    while len(view):
        count = os.preadv(descriptor, [view], offset)
        if count == 0:
            raise ModelError(f"base: a weight file ends at byte {offset}; it changed while it was read")
        view, offset = view[count:], offset + count


def base_shards(base: Path) -> dict[str, dict[str, Place]]:
    """Shard file -> its tensors. ModelError if a file is missing, torn, or not as the index says."""
    for single, index in FORMATS:
        if (base / single).is_file():
            return {single: _places(base / single)}
        if (base / index).is_file():
            return _indexed(base, index)
    names = " nor ".join(name for pair in FORMATS for name in pair)
    raise ModelError(f"base {base}: neither {names}; save it with save_pretrained")


def _indexed(base: Path, index: str) -> dict[str, dict[str, Place]]:
    try:
        weight_map: dict[str, str] = json.loads((base / index).read_text("utf-8"))["weight_map"]
        named = sorted(set(weight_map.values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"{base / index}: no index of weights ({error}); download the base model again") from None
    for name in named:
        if Path(name).name != name:
            raise ModelError(f"{base / index}: names the file {name!r}, which is not in its folder")
        if not (base / name).is_file():
            raise ModelError(f"{base / index}: names {name}, which is not there; download the base model again")
    shards = {name: _places(base / name) for name in named}
    for tensor, shard in weight_map.items():
        if tensor not in shards[shard]:
            raise ModelError(f"{base / index}: says that {tensor} is in {shard}, which does not hold it")
    for shard, places in shards.items():
        for tensor in places:
            if weight_map.get(tensor) != shard:
                raise ModelError(f"{base / index}: does not say that {shard} holds {tensor}; download it again")
    return shards


def _places(path: Path) -> dict[str, Place]:
    with path.open("rb") as file:
        if file.read(len(LFS)) == LFS:
            raise ModelError(f"{path}: is a pointer of Git LFS, not the weights; run `git lfs pull` in its folder")
    return _pickled(path) if path.suffix == ".bin" else _safetensors(path)


def _safetensors(path: Path) -> dict[str, Place]:
    """The library opens the file first: it checks offsets and length."""
    try:
        with safe_open(path, framework="pt"), path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, MAX_HEADER_BYTES)))
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: missing or torn ({error}); download the base model again") from None
    header.pop("__metadata__", None)
    unknown = {entry["dtype"] for entry in header.values()} - set(DTYPES)
    if unknown:
        raise ModelError(f"{path}: holds tensors of {min(unknown)}; take a base of 16 or 32-bit weights")
    places = {name: _place(path, 8 + length, entry) for name, entry in header.items()}
    return dict(sorted(places.items(), key=lambda item: item[1].offset))


def _place(path: Path, start: int, entry: dict[str, Any]) -> Place:
    return Place(path, start + entry["data_offsets"][0], DTYPES[entry["dtype"]], tuple(entry["shape"]))


def _pickled(path: Path) -> dict[str, Place]:
    places = {}
    for name, tensor in read_pickle(path).items():
        if not isinstance(tensor, torch.Tensor) or not tensor.is_contiguous():
            raise ModelError(f"{path}: {name} is no tensor laid out row by row; save the base as safetensors")
        offset = int(tensor.storage_offset()) * tensor.itemsize  # the storage is the mapped file
        places[str(name)] = Place(path, offset, tensor.dtype, tuple(tensor.shape))
    return dict(sorted(places.items(), key=lambda item: (item[1].offset, item[0])))
