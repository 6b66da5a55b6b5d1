"""Weight files written as a stream: each tensor goes to its place in the file, a part of it in memory.

In: a plan of edits. Out: safetensors files with their index, and how many tensors were merged, dequantised, replaced,
or left as they were. The bytes depend on the inputs alone: every tensor's place is known before the first is written.
"""

import errno
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import astuple, dataclass
from itertools import groupby
from pathlib import Path
from typing import BinaryIO

import torch

from sft_core.convert.writer import Slot, header_of, one_thread, require_space, split_shards, write_index
from sft_core.errors import ModelError
from sft_core.merge.arithmetic import (
    Workspace,
    add_rows,
    check_finite,
    needs_all_rows,
    rows_at_a_time,
)
from sft_core.merge.nf4 import round_trip
from sft_core.merge.placing import Edit, Plan

MAX_WORKERS = 8
"""Threads, each with a tensor of its own; memory bandwidth ends what more could do."""
WRITE_BYTES = 1 << 20
"""In one call at most: of more, Linux takes larger pieces of memory, which a virtual machine may first have to get back
from its host. Seen: 2 MB at a time took five times the system time."""
NOT_BY_KERNEL = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)


@dataclass(frozen=True, slots=True)
class MergeCount:
    """Tensors of the output by what became of them. `swallowed`: the update was lost whole in rounding."""

    total: int = 0
    merged: int = 0
    swallowed: int = 0
    dequantized: int = 0
    saved: int = 0


@dataclass(frozen=True, slots=True)
class _Job:
    """One tensor, and where in the output it goes."""

    slot: Slot
    edit: Edit
    file: Path
    offset: int

    @property
    def whole(self) -> bool:
        """True if the weight must be in memory whole, so that one at a time is enough."""
        return self.edit.dequantize or needs_all_rows(self.edit)


def write_stream(plan: Plan, out: Path, max_shard_size: int | None, compute_dtype: torch.dtype) -> MergeCount:
    """Write the merged weight files. ModelError if nothing changed, or a sum overflows the base's dtype."""
    edits = {name: edit for found in plan.shards.values() for name, edit in found.items()}
    if max_shard_size is None:
        shards = {_file_name(s): [e.place.slot(n) for n, e in found.items()] for s, found in plan.shards.items()}
    else:
        shards = split_shards([edit.place.slot(name) for name, edit in edits.items()], max_shard_size)
    require_space(out, (slot for slots in shards.values() for slot in slots))
    jobs = [job for shard, slots in shards.items() for job in _laid_out(out / shard, slots, edits)]
    space = Workspace()
    counts = [_write_tensor(job, space, compute_dtype) for job in jobs if job.whole]
    counts += _in_parallel([job for job in jobs if not job.whole], space, compute_dtype)
    write_index(out, shards)
    count = MergeCount(*(sum(column) for column in zip(*map(astuple, counts), strict=True)))
    if count.merged + count.saved == count.swallowed:
        raise ModelError(
            f"merged model equals its base {edits[next(iter(edits))].place.file.parent}: no update survives rounding; "
            "was the adapter trained?"
        )
    return count


def _file_name(shard: str) -> str:
    return shard.replace("pytorch_model", "model").replace(".bin", ".safetensors")


def _laid_out(file: Path, slots: list[Slot], edits: dict[str, Edit]) -> Iterator[_Job]:
    """Write the header, give the file its size; then a job for each tensor."""
    header = header_of(slots)
    file.write_bytes(header)
    offset = len(header)
    for slot in slots:
        yield _Job(slot, edits[slot.name], file, offset)
        offset += slot.nbytes
    os.truncate(file, offset)


def _in_parallel(jobs: list[_Job], space: Workspace, compute_dtype: torch.dtype) -> list[MergeCount]:
    """Do all jobs, one torch thread a worker: a chunk is too small to be worth dividing further."""
    workers = min(MAX_WORKERS, len(os.sched_getaffinity(0)))
    files = [deque(found) for _, found in groupby(jobs, key=lambda job: job.file)]
    untaken = deque(files)

    def work() -> list[MergeCount]:
        return [_write_tensor(job, space, compute_dtype) for job in _next_jobs(untaken, files)]

    with one_thread(), ThreadPoolExecutor(workers) as pool:
        running = [pool.submit(work) for _ in range(workers)]
        try:
            return [count for done in running for count in done.result()]
        finally:
            for left in files:
                left.clear()  # after an error or an interrupt the others stop as well


def _next_jobs(untaken: deque[deque[_Job]], files: list[deque[_Job]]) -> Iterator[_Job]:
    """Jobs of a file that no other worker writes, as long as there is one: a file takes one write at a time."""
    while True:
        try:
            mine = untaken.popleft()
        except IndexError:
            mine = max(files, key=len, default=deque())
            if not mine:
                return
        with suppress(IndexError):
            while True:
                yield mine.popleft()


def _write_tensor(job: _Job, space: Workspace, compute_dtype: torch.dtype) -> MergeCount:
    slot, edit = job.slot, job.edit
    changed = False
    with job.file.open("r+b", buffering=0) as file:
        if edit.copied and _copied_by_kernel(job, file):
            return MergeCount(total=1)
        file.seek(job.offset)
        for first, rows in _chunks(edit, compute_dtype):
            result = rows
            if not edit.copied:
                result = space.take("out", tuple(rows.shape), slot.dtype)
                if edit.update is not None:
                    add_rows(edit, first, rows, result, space)
                else:
                    result.copy_(rows)
                if edit.rows is not None:
                    edit.rows.put(first, result)
                check_finite(slot.name, result)
                changed = changed or _differ(result, rows.to(slot.dtype))
            view = result.reshape(-1).view(torch.uint8).numpy().data
            while len(view):
                view = view[file.write(view[:WRITE_BYTES]) :]
    return MergeCount(
        total=1,
        merged=edit.update is not None,
        swallowed=edit.update is not None and not changed,
        dequantized=edit.dequantize,
        saved=edit.saved is not None or edit.rows is not None,
    )


def _differ(result: torch.Tensor, rows: torch.Tensor) -> bool:
    """True if a value changed (-0.0 is 0.0); one row tells most of the time."""
    return not (torch.equal(result[:1], rows[:1]) and torch.equal(result, rows))


def _copied_by_kernel(job: _Job, file: BinaryIO) -> bool:
    """Copy the bytes without bringing them here. False where the kernel does not, between these two files."""
    place, done = job.edit.place, 0
    with place.file.open("rb", buffering=0) as source:
        while done < job.slot.nbytes:
            offsets = place.offset + done, job.offset + done
            try:
                count = os.copy_file_range(source.fileno(), file.fileno(), job.slot.nbytes - done, *offsets)
            except OSError as error:
                if error.errno in NOT_BY_KERNEL:
                    return False
                raise
            if count == 0:
                return False
            done += count
    return True


def _chunks(edit: Edit, compute_dtype: torch.dtype) -> Iterator[tuple[int, torch.Tensor]]:
    """First row and rows of each chunk of the weight that the edit starts from, (rows, columns)."""
    place, step = edit.place, rows_at_a_time(edit)
    if edit.saved is None and not edit.dequantize:
        yield from place.chunks(step)
        return
    whole = edit.saved if edit.saved is not None else round_trip(place.read(), compute_dtype)
    whole = whole.reshape(place.rows)
    for first in range(0, len(whole), step):
        yield first, whole[first : first + step]
