"""Weight files written as a stream: read, sum and write overlap, and a few megabytes are in memory.

In: a plan of edits. Out: safetensors files with their index, and how many tensors were merged, dequantised, replaced,
or left as they were. The bytes depend on the inputs alone.
"""

import math
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sft_core.convert.writer import Slot, header_of, split_shards, write_index
from sft_core.errors import ModelError
from sft_core.merge.arithmetic import Workspace, add_rows, check_finite, rows_at_a_time
from sft_core.merge.nf4 import round_trip
from sft_core.merge.placing import Edit, Plan
from sft_core.merge.shards import read_into

BUFFERS = 3
COPY_BYTES = 8_000_000


@dataclass(slots=True)
class MergeCount:
    """Tensors of the output by what became of them. `swallowed`: the update was lost whole in rounding."""

    total: int = 0
    merged: int = 0
    swallowed: int = 0
    dequantized: int = 0
    saved: int = 0


@dataclass(slots=True)
class _Pipe:
    """One reader's and BUFFERS writers' buffers; a thread writes one chunk while the next is summed."""

    pool: ThreadPoolExecutor
    raw: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    buffers: list[torch.Tensor] = field(default_factory=lambda: [torch.empty(0, dtype=torch.uint8)] * BUFFERS)
    pending: list[Future[None] | None] = field(default_factory=lambda: [None] * BUFFERS)
    turn: int = 0
    space: Workspace = field(default_factory=Workspace)

    def read(self, descriptor: int, offset: int, nbytes: int) -> torch.Tensor:
        """Bytes of a file; valid until the next call."""
        if len(self.raw) < nbytes:
            self.raw = torch.empty(nbytes, dtype=torch.uint8)
        read_into(descriptor, offset, self.raw[:nbytes])
        return self.raw[:nbytes]

    def free(self, nbytes: int) -> torch.Tensor:
        """A buffer that no write needs any more."""
        self.turn = (self.turn + 1) % BUFFERS
        waiting = self.pending[self.turn]
        if waiting is not None:
            waiting.result()
        if len(self.buffers[self.turn]) < nbytes:
            self.buffers[self.turn] = torch.empty(nbytes, dtype=torch.uint8)
        return self.buffers[self.turn][:nbytes]

    def write(self, file: Any, data: torch.Tensor) -> None:
        """Write the buffer that `free` gave last."""
        self.pending[self.turn] = self.pool.submit(_write_all, file, data.numpy().data)

    def flush(self) -> None:
        """Wait for all writes."""
        for waiting in self.pending:
            if waiting is not None:
                waiting.result()
        self.pending = [None] * BUFFERS


def _write_all(file: Any, view: memoryview) -> None:
    while len(view):
        view = view[file.write(view) :]


def write_stream(plan: Plan, out: Path, max_shard_size: int | None, compute_dtype: torch.dtype) -> MergeCount:
    """Write the merged weight files. ModelError if nothing changed, or a sum overflows the base's dtype."""
    edits = {name: edit for found in plan.shards.values() for name, edit in found.items()}
    if max_shard_size is None:
        shards = {_file_name(s): [e.place.slot(n) for n, e in found.items()] for s, found in plan.shards.items()}
    else:
        shards = split_shards([edit.place.slot(name) for name, edit in edits.items()], max_shard_size)
    count = MergeCount()
    with ThreadPoolExecutor(1) as pool:
        pipe = _Pipe(pool)
        for shard, slots in shards.items():
            with (out / shard).open("wb", buffering=0) as file:
                _write_all(file, memoryview(header_of(slots)))
                for slot in slots:
                    _write_tensor(slot, edits[slot.name], file, pipe, compute_dtype, count)  # in the file's order
                pipe.flush()
    write_index(out, shards)
    if count.merged + count.saved == count.swallowed:
        raise ModelError(
            f"merged model equals its base {edits[next(iter(edits))].place.file.parent}: no update survives rounding; "
            "was the adapter trained?"
        )
    return count


def _file_name(shard: str) -> str:
    return shard.replace("pytorch_model", "model").replace(".bin", ".safetensors")


def _write_tensor(  # noqa: PLR0913
    slot: Slot, edit: Edit, file: Any, pipe: _Pipe, compute_dtype: torch.dtype, count: MergeCount
) -> None:
    count.total += 1
    if edit.copied:
        _copy(edit, file, pipe)
        return
    changed = False
    width = math.prod(slot.shape[1:])
    step = rows_at_a_time(edit) if slot.shape else 1
    for first, rows in _rows(edit, pipe, compute_dtype, step):
        data = pipe.free(len(rows) * width * slot.dtype.itemsize)
        result = data.view(slot.dtype).view(len(rows), width)
        if edit.update is not None:
            add_rows(slot.name, edit, first, rows, result, pipe.space)
        else:
            result.copy_(rows)
            check_finite(slot.name, result)
        changed = changed or not torch.equal(result, rows.to(slot.dtype))
        pipe.write(file, data)
    count.dequantized += edit.dequantize
    count.saved += edit.saved is not None
    count.merged += edit.update is not None
    count.swallowed += edit.update is not None and not changed


def _rows(edit: Edit, pipe: _Pipe, compute_dtype: torch.dtype, step: int) -> Iterator[tuple[int, torch.Tensor]]:
    """First row and rows of each chunk of the weight that the edit starts from, (rows, columns)."""
    place = edit.place
    height, width = (place.shape[0], math.prod(place.shape[1:])) if place.shape else (1, 1)
    if edit.saved is not None or edit.dequantize:
        whole = edit.saved if edit.saved is not None else round_trip(place.read(), compute_dtype)
        whole = whole.reshape(height, width)
        for first in range(0, height, step):
            yield first, whole[first : first + step]
        return
    line = width * place.dtype.itemsize
    with place.file.open("rb", buffering=0) as file:
        for first in range(0, height, step):
            count = min(step, height - first)
            data = pipe.read(file.fileno(), place.offset + first * line, count * line)
            yield first, data.view(place.dtype).view(count, width)


def _copy(edit: Edit, file: Any, pipe: _Pipe) -> None:
    """The bytes as they are, inside the kernel where it can."""
    pipe.flush()
    offset, left = edit.place.offset, edit.place.slot("").nbytes
    with edit.place.file.open("rb", buffering=0) as source:
        while left:
            sent = os.sendfile(file.fileno(), source.fileno(), offset, min(left, COPY_BYTES))
            if sent == 0:
                raise ModelError(f"{edit.place.file}: ends at byte {offset}; it changed while it was read")
            offset, left = offset + sent, left - sent
