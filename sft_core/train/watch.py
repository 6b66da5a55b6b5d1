"""Stops a run whose optimizer step went bad, and says which rows it was.

In: the loss of every micro-batch, the gradient norm of every optimizer step. Out: TrainError on all ranks if one of
them is NaN or infinite, or a loss is exactly 0 although tokens are supervised. Raised before anything is saved.
"""

import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import torch.distributed as dist

from sft_core.errors import TrainError
from sft_core.pack import PackedDataset
from sft_core.shard_rows import locate
from sft_core.shards import read_shard_list
from sft_core.train.stream import PackedStream

NAMED_ROWS = 16
"""Rows that a message names at most."""
ORIGIN = ("row_id", "dataset", "file", "row_number")
MOST_OVERFLOWS = 20
"""Steps in a row that float16 may leave out: from 2 ** 16, the scale is then below 1."""


class StepWatch:
    """Keeps the losses of the optimizer step at hand."""

    def __init__(self, packed: PackedDataset, stream: PackedStream, conversations: Path | None) -> None:
        self._packed, self._stream, self._conversations = packed, stream, conversations
        self._overflows = 0
        self._losses: list[torch.Tensor] = []
        self._supervised: list[torch.Tensor | int] = []
        self._rows: list[list[int]] = []

    def add(self, loss: torch.Tensor, supervised: torch.Tensor | int, rows: list[int]) -> None:
        """One micro-batch: its loss, its number of supervised tokens, the numbers of its rows in the stream."""
        self._losses.append(loss)
        self._supervised.append(supervised)
        self._rows.append(rows)

    def check(self, optimizer_step: int, grad_norm: float, may_overflow: bool) -> None:
        """End of an optimizer step. `may_overflow`: a loss scale is still being looked for, so the gradient may be
        infinite for a while; such steps are left out."""
        losses = torch.stack(self._losses)  # (micro-batches,)
        supervised = torch.tensor([int(count) for count in self._supervised], device=losses.device)
        rows = self._rows
        self._losses, self._supervised, self._rows = [], [], []
        bad = ~losses.isfinite() | ((losses == 0) & (supervised > 0))
        self._overflows = 0 if math.isfinite(grad_norm) else self._overflows + 1
        fault = self._overflows > (MOST_OVERFLOWS if may_overflow else 0)
        if not _any_rank(bool(bad.any()) or fault, losses.device):
            return
        seen = [(str(float(loss)), is_bad, row) for loss, is_bad, row in zip(losses, bad.tolist(), rows, strict=True)]
        seen = [entry for entries in _from_all_ranks(seen) for entry in entries]
        culprits = [entry for entry in seen if entry[1]]
        what = f"the losses are finite, but the gradient's norm is {grad_norm}"
        if culprits:
            what = "loss is " + ", ".join(sorted({loss for loss, *_ in culprits}))
        row_ids = self._row_ids([row for *_, numbers in culprits or seen for row in numbers])
        raise TrainError(
            f"optimizer step {optimizer_step}: {what}; nothing useful can follow, and nothing of this step was saved. "
            f"Its rows: {self._name_rows(row_ids)}. Look at them, or lower train.learning_rate"
        )

    def _row_ids(self, rows: list[int]) -> list[str]:
        items = [item for row in rows if row < self._stream.rows for item in self._stream.bins[row]]
        return list(dict.fromkeys(self._packed.row_id(getattr(item, "number", item)) for item in items))

    def _name_rows(self, row_ids: list[str]) -> str:
        named = row_ids[:NAMED_ROWS]
        sources = sources_of(self._conversations, named) if self._conversations else {}
        more = f"; and {len(row_ids) - NAMED_ROWS} more" if len(row_ids) > NAMED_ROWS else ""
        return "; ".join(f"{sources[row]} ({row})" if row in sources else row for row in named) + more


def sources_of(conversations: Path, row_ids: list[str]) -> dict[str, str]:
    """Where rows come from, by row_id: data set, file and row number; the first of several copies. Those that are not
    there are left out."""
    places = {shard.name: shard.place for shard in read_shard_list(conversations)}
    wanted = pa.array(row_ids, pa.string())
    found: dict[str, str] = {}
    for path in sorted((conversations / "train").glob("part-*.parquet")):
        with pq.ParquetFile(path) as shard:
            table = shard.read([name for name in ORIGIN if name in shard.schema_arrow.names])
        for local in table.filter(pc.is_in(table.column("row_id"), wanted)).to_pylist():
            row = locate(local, places.get(path.stem, {}))
            found.setdefault(row["row_id"], f"{row['dataset']}, {row['file']}, row {row['row_number']}")
    return found


def _any_rank(flag: bool, device: torch.device) -> bool:
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return flag
    shared = torch.tensor(int(flag), device=device)
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return bool(shared)


def _from_all_ranks(value: Any) -> list[Any]:
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
