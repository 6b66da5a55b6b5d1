"""`sft data check`: would this data set do, and which map_fn reads it?

In: a data set, where the user named one a map_fn, and what a run would ask of its rows. Out: a `CheckReport`. All is
written to a temporary folder and dropped. Where `sft run` would fail, the report has a warning. Without a map_fn the
one is taken that understands most of the first TRIED_ROWS rows, by the bytes of the columns that it reads (not by
rows: the one that ignores most would read most); of several the first in `sft_core.normalize.reads`; pretrain, which
reads any text, only where no other reads a row.
"""

import itertools
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_core.account import NO_FAULT
from sft_core.errors import DataError, RowError
from sft_core.fetch import fetch_dataset
from sft_core.normalize.dataset import NormalizeSource, plan_shards, sort_rows
from sft_core.normalize.limits import check_lost, check_sides
from sft_core.normalize.load import load_map_fn, shipped_name
from sft_core.normalize.map_fns import MAP_FNS
from sft_core.normalize.reads import READS, added_system, holds_something, suggest_map_fns
from sft_core.normalize.rows import convert_row, read_row
from sft_core.normalize.tally import Tally
from sft_core.recipe import DatasetConfig, NormalizeConfig, Recipe, RegisterConfig
from sft_core.shard_rows import read_shards

TRIED_ROWS = 500
ENOUGH = 0.5
"""Fraction of rows. Below it the report names other map_fns."""
MOST = 0.5
"""Fraction of what the best map_fn understands that counts as much as all of it: then `READS` has the order."""
LAST = "pretrain"


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a run asks of its rows; the defaults are the recipe's."""

    normalize: NormalizeConfig = NormalizeConfig()
    register: RegisterConfig = RegisterConfig()
    eval_fraction: float = Recipe.model_fields["eval_fraction"].default
    seed: int = Recipe.model_fields["seed"].default
    max_quarantined_fraction: float = Recipe.model_fields["max_quarantined_fraction"].default
    eval_datasets: bool = False
    """Rows of other data sets are held out too."""

    @classmethod
    def by(cls, recipe: Recipe) -> "Asked":
        """What this recipe asks."""
        return cls(
            normalize=recipe.normalize,
            register=recipe.register_,
            eval_fraction=recipe.eval_fraction,
            seed=recipe.seed,
            max_quarantined_fraction=recipe.max_quarantined_fraction,
            eval_datasets=bool(recipe.eval_datasets),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckReport:
    """What became of a data set's rows. `held_out` are among `rows_out`; `set_aside`: by reasons that are no fault;
    `fitting`: shipped map_fns for its columns, the rows each reads, best first; `unread_columns`: rows that hold
    something in a column that a shipped map_fn does not read; `dropped_nulls`: keys without a value that Parquet or
    Arrow had in tool calls and tools; `adds_system`: the system prompt that it puts into every row; `warnings`: why a
    run would fail."""

    map_fn: str
    chosen: bool
    rows_in: int
    rows_out: int
    held_out: int
    eval_fraction: float
    quarantined: dict[str, int]
    set_aside: dict[str, int]
    warnings: tuple[str, ...]
    fitting: dict[str, int]
    tried_rows: int
    columns: tuple[str, ...]
    dropped_nulls: int
    unread_columns: dict[str, int]
    adds_system: str
    ledger: dict[str, Any]
    examples: dict[str, Any]

    @property
    def little_fits(self) -> bool:
        """Whether too few rows became conversations."""
        return self.rows_out < ENOUGH * self.rows_in


def check_dataset(dataset: DatasetConfig, map_fn: str | None = None, asked: Asked = Asked()) -> CheckReport:  # noqa: B008 - frozen
    """Fetch and normalize a data set, and drop the result. SourceError or DataError when it cannot be read at all."""
    if map_fn is not None:
        load_map_fn(map_fn)  # a wrong name fails before anything is fetched
    with tempfile.TemporaryDirectory(prefix="sft-check-") as folder:
        fetched = Path(folder) / "fetch"
        dropped_nulls = fetch_dataset(dataset, fetched).facts["dropped_nulls"]
        first = list(itertools.islice(read_shards(fetched / "rows"), TRIED_ROWS))
        fitting, columns = _fitting(first)
        name = map_fn or next(iter(fitting), "default")
        source = NormalizeSource(rows=fetched, map_fn=name, name=Path(dataset.path).name or dataset.path)
        shards = plan_shards([source], asked.eval_fraction, asked.seed)
        tally = sort_rows(shards, asked.normalize.near_duplicates, False, Path(folder) / "out")
    reasons, facts = tally.reasons.most_common(), tally.facts()
    return CheckReport(
        map_fn=shipped_name(name) or name,
        chosen=map_fn is None,
        rows_in=tally.rows,
        rows_out=tally.on("train") + tally.on("heldout"),
        held_out=tally.on("heldout"),
        eval_fraction=asked.eval_fraction,
        quarantined={reason: count for reason, count in reasons if reason not in NO_FAULT},
        set_aside={reason: count for reason, count in reasons if reason in NO_FAULT},
        warnings=tuple(_warnings(tally, asked, {source.name: name})),
        fitting=fitting,
        tried_rows=len(first),
        columns=columns,
        dropped_nulls=dropped_nulls,
        unread_columns=facts["datasets"].get(source.name, {}).get("unread_columns", {}),
        adds_system=added_system(shipped_name(name) or name),
        ledger=tally.ledger(),
        examples=facts["examples"],
    )


def _warnings(tally: Tally, asked: Asked, map_fns: dict[str, str]) -> Iterator[str]:
    """Why a run on these rows alone would fail."""
    from sft_core.outlook.heldout import heldout_needed, heldout_shortage  # which reads conversations itself

    try:
        if tally.rows:
            check_lost(tally.facts(), tally.ledger(), map_fns, asked.max_quarantined_fraction)
        check_sides(tally, map_fns, held_out=not asked.eval_datasets)
    except DataError as error:
        yield str(error)
        return
    left = tally.on("heldout")
    if left < heldout_needed(asked.register) and not asked.eval_datasets:
        yield heldout_shortage(left, asked.register, tally.reasons)


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
    names = [name for name in READS if name in suggested]
    read = {
        name: [found for row in rows if READS[name].fits(row) and (found := _understood(name, row))] for name in names
    }
    best = max((sum(read[name]) for name in names if name != LAST), default=0)
    enough = MOST * best if best else float("inf")
    ordered = sorted(names, key=lambda name: (name == LAST and best > 0, -min(sum(read[name]), enough)))
    return {name: len(read[name]) for name in ordered}, next(iter(columns.most_common(1)), ((), 0))[0]


def _understood(name: str, row: dict[str, Any]) -> int:
    """Bytes of a row in the columns that a map_fn reads; 0 where it makes nothing of the row."""
    try:
        convert_row(row, MAP_FNS[name])
    except RowError:
        return 0
    read = READS[name].of(row)
    return 1 + sum(
        len(str(value).encode("utf-8", "replace"))
        for column, value in row.items()
        if column in read and holds_something(value)
    )
