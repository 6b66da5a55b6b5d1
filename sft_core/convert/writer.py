"""safetensors files written as a stream: one tensor is in memory at a time, equal bytes for equal tensors.

In: names, dtypes and shapes in order, then the bytes. Out: `NAME.safetensors`, or numbered shards with an index whose
`total_size` is in bytes. Source of the format: https://github.com/huggingface/safetensors (8 bytes of length, a JSON
header padded with spaces to 8 bytes, the numbers in little-endian order).
"""

import json
import math
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sft_core.convert.trained import Stored
from sft_core.errors import ModelError, RecipeError

CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {code: dtype for dtype, code in CODES.items()}
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a tensor goes: `nbytes` behind the tensors before it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size on disk."""
        return math.prod(self.shape) * self.dtype.itemsize


def shard_size(text: str) -> int:
    """Bytes of `5GB`, `500MB`, `2GiB` (powers of ten, as in transformers, unless with an i)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)?", text.strip().upper())
    if match is None or float(match[1]) <= 0:
        raise RecipeError(f"--max-shard-size {text!r}: say a size, such as 5GB or 500MB")
    return int(float(match[1]) * UNITS[match[2] or ""])


def split_shards(slots: Iterable[Slot], limit: int | None, stem: str = "model") -> dict[str, list[Slot]]:
    """File name -> its tensors, in order; no file over `limit` bytes unless one tensor alone is."""
    groups: list[list[Slot]] = [[]]
    size = 0
    for slot in slots:
        if limit is not None and groups[-1] and size + slot.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(slot)
        size += slot.nbytes
    if len(groups) == 1:
        return {f"{stem}.safetensors": groups[0]}
    return {f"{stem}-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def header_of(slots: Iterable[Slot]) -> bytes:
    """Length and header of a file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for slot in slots:
        end = offset + slot.nbytes
        header[slot.name] = {"dtype": CODES[slot.dtype], "shape": list(slot.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def require_space(out: Path, slots: Iterable[Slot]) -> None:
    """ModelError before the first byte rather than after the last that fits."""
    needed, free = sum(slot.nbytes for slot in slots), shutil.disk_usage(out).free
    if needed > free:
        raise ModelError(f"{out}: {needed / 1e9:,.1f} GB are to be written, the disk has {free / 1e9:,.1f} GB left")


def write_index(out: Path, shards: dict[str, list[Slot]]) -> None:
    """`model.safetensors.index.json`, if there is more than one shard."""
    if len(shards) == 1 and "model.safetensors" in shards:
        return
    weight_map = {slot.name: shard for shard, slots in shards.items() for slot in slots}
    total = sum(slot.nbytes for slots in shards.values() for slot in slots)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (out / "model.safetensors.index.json").write_text(text, "utf-8")


@contextmanager
def one_thread() -> Iterator[None]:
    """One torch thread inside: threads that wait for each other at every tensor cost more than they save."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def write_tensors(out: Path, shards: dict[str, list[Slot]], tensors: dict[str, Stored]) -> Iterator[torch.Tensor]:
    """Write the files, yielding each tensor as it was written, so that a caller can look at it once."""
    for shard, slots in shards.items():
        with (out / shard).open("wb") as file:
            file.write(header_of(slots))
            for slot in slots:
                tensor = tensors[slot.name].read().to(slot.dtype).contiguous()
                assert tuple(tensor.shape) == slot.shape, f"{slot.name} must keep its shape"
                file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
                yield tensor
