"""`sft data check`: would this data set do, and which map_fn reads it?

In: a data set and, where the user named one, a map_fn. Out: a `CheckReport`. All is written to a temporary folder and
dropped; no limit applies, an empty side is no fault. Without a map_fn the one is taken that reads most of the first
TRIED_ROWS rows; of equals the first in `sft_core.normalize.columns`; pretrain, which reads any text, only where no
other reads a row.
"""

import itertools
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_core.errors import RowError
from sft_core.fetch import fetch_dataset
from sft_core.normalize.columns import COLUMNS, suggest_map_fns
from sft_core.normalize.dataset import NormalizeSource, plan_shards, sort_rows
from sft_core.normalize.load import load_map_fn, shipped_name
from sft_core.normalize.map_fns import MAP_FNS
from sft_core.normalize.rows import read_conversation, read_row
from sft_core.recipe import DatasetConfig
from sft_core.shard_rows import read_shards

TRIED_ROWS = 500
ENOUGH = 0.5
"""Fraction of rows. Below it the report names other map_fns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckReport:
    """What became of a data set's rows. `fitting`: shipped map_fns for its columns, the rows each reads, best first."""

    map_fn: str
    chosen: bool
    rows_in: int
    rows_out: int
    quarantined: dict[str, int]
    fitting: dict[str, int]
    tried_rows: int
    columns: tuple[str, ...]
    ledger: dict[str, Any]
    examples: dict[str, Any]

    @property
    def little_fits(self) -> bool:
        """Whether too few rows became conversations."""
        return self.rows_out < ENOUGH * self.rows_in


def check_dataset(dataset: DatasetConfig, map_fn: str | None = None) -> CheckReport:
    """Fetch and normalize a data set, and drop the result. SourceError or DataError when it cannot be read at all."""
    if map_fn is not None:
        load_map_fn(map_fn)  # a wrong name fails before anything is fetched
    with tempfile.TemporaryDirectory(prefix="sft-check-") as folder:
        fetched = Path(folder) / "fetch"
        fetch_dataset(dataset, fetched)
        first = list(itertools.islice(read_shards(fetched / "rows"), TRIED_ROWS))
        fitting, columns = _fitting(first)
        name = map_fn or next(iter(fitting), "default")
        source = NormalizeSource(rows=fetched, map_fn=name, name=Path(dataset.path).name or dataset.path)
        tally = sort_rows(plan_shards([source], 0.0, 0), None, False, Path(folder) / "out")
    return CheckReport(
        map_fn=shipped_name(name) or name,
        chosen=map_fn is None,
        rows_in=tally.rows,
        rows_out=tally.on("train"),
        quarantined=dict(tally.reasons.most_common()),
        fitting=fitting,
        tried_rows=len(first),
        columns=columns,
        ledger=tally.ledger(),
        examples=tally.facts()["examples"],
    )


def _fitting(records: list[dict[str, Any]]) -> tuple[dict[str, int], tuple[str, ...]]:
    """Rows that each map_fn for these columns reads, best first, and the columns of most rows."""
    rows, columns = [], Counter[tuple[str, ...]]()
    for record in records:
        try:
            rows.append(read_row(record))
        except RowError:
            continue  # not a row at all: no map_fn reads it
        columns[tuple(sorted(rows[-1]))] += 1
    suggested = {name for row in rows for name in suggest_map_fns(row)}
    names = [name for name in COLUMNS if name in suggested]
    read = {name: sum(_reads(name, record) for record in records) for name in names}
    last = {"pretrain"} if any(count for name, count in read.items() if name != "pretrain") else set()
    ordered = sorted(names, key=lambda name: (name in last, -read[name]))
    return {name: read[name] for name in ordered}, next(iter(columns.most_common(1)), ((), 0))[0]


def _reads(name: str, record: dict[str, Any]) -> bool:
    try:
        read_conversation(record, MAP_FNS[name])
    except RowError:
        return False
    return True
