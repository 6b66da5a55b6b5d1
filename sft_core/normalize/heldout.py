"""The held-out side, put together anew from the shards' candidates on every run: it depends on the whole training side.

In: shards as `shard.make_shard` writes them. Out: `heldout/part-*.parquet` (CONVERSATION_SCHEMA), and
`quarantine/part-00000.jsonl` with the rows that shards set aside and those taken out here, in order. What leaves the
held-out side never goes to the training side. Memory holds the candidates' ids and signatures, and the
signatures of a few shards.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa

from sft_core.normalize.near_duplicates import HeldOutSignatures
from sft_core.normalize.shard import CANDIDATES, REFUSED, SIGNATURES, TRAIN
from sft_core.normalize.sketch import BINS, Signatures
from sft_core.normalize.tables import located, parquet_bytes, read_parquet, sizes
from sft_core.normalize.tally import Amount, Example, Tally
from sft_core.shard_rows import MOST_BYTES, MOST_ROWS, locate
from sft_core.shards import Shard

SHARDS_AT_ONCE = 16
"""Shards whose signatures are looked up in one go."""


@dataclass(frozen=True, slots=True)
class Aside:
    """Why a candidate is not held out."""

    reason: str
    detail: str


def settle(out: Path, shards: Sequence[Shard], near_duplicates: float | None, overlaps: bool) -> dict[int, Aside]:
    """Which candidates, counted through all shards, are not held out. `overlaps`: whether some may be in training."""
    tables = [read_parquet(path, ["row_id", "signature"]) for path, _ in _having(out, shards, CANDIDATES)]
    if not tables:
        return {}
    ids = [row_id for table in tables for row_id in table.column("row_id").to_pylist()]
    aside = _also_in_training(out, shards, ids) if overlaps else {}
    if near_duplicates is not None:
        left = np.array([place for place in range(len(ids)) if place not in aside], np.int64)
        signatures = np.concatenate([_signatures(table) for table in tables])[left]
        aside |= {int(left[place]): why for place, why in _near(out, shards, signatures, near_duplicates)}
    seen: set[str] = set()
    for place, row_id in enumerate(ids):
        if place not in aside and row_id in seen:
            aside[place] = Aside("repeated", "held out already; once is enough")
        seen.add(row_id)
    return aside


class HeldOutWriter:
    """Sends every candidate to the held-out side or the quarantine."""

    def __init__(self, out: Path, quarantine: IO[str], aside: dict[int, Aside], tally: Tally) -> None:
        self._out, self._quarantine, self._aside, self._tally = out, quarantine, aside, tally
        self._next = self._parts = 0
        self._pending: list[pa.Table] = []
        self._rows = self._bytes = 0

    def add_shard(self, shard: Shard) -> None:
        """The rows that a shard set aside, and its candidates."""
        if REFUSED in shard.files:
            with shard.path(self._out, REFUSED).open(encoding="utf-8", newline="\n") as lines:
                for line in lines:
                    self._refuse(locate(json.loads(line), shard.place))
        if CANDIDATES in shard.files:
            self._take(located(read_parquet(shard.path(self._out, CANDIDATES)), shard.place))

    def close(self) -> None:
        """Write what is left."""
        if self._pending:
            (self._out / "heldout").mkdir(parents=True, exist_ok=True)
            path = self._out / "heldout" / f"part-{self._parts:05d}.parquet"
            path.write_bytes(parquet_bytes(pa.concat_tables(self._pending).combine_chunks()))
            self._parts += 1
            self._pending, self._rows, self._bytes = [], 0, 0

    def _take(self, table: pa.Table) -> None:
        turns, characters = sizes(table)
        asides = [self._aside.get(self._next + row) for row in range(len(table))]
        self._next += len(table)
        kept = np.array([aside is None for aside in asides], bool)
        if kept.any():
            amount = Amount(int(kept.sum()), int(turns[kept].sum()), int(characters[kept].sum()))
            self._tally.hold_out(table.column("dataset")[0].as_py(), amount)
            self._pending.append(table.filter(pa.array(kept)))
            self._rows, self._bytes = self._rows + len(self._pending[-1]), self._bytes + self._pending[-1].nbytes
            if self._rows >= MOST_ROWS or self._bytes >= MOST_BYTES:
                self.close()
        for row in np.flatnonzero(~kept).tolist():
            why, record = asides[row], table.slice(row, 1).to_pylist()[0]
            assert why is not None
            origin = {key: record[key] for key in ("dataset", "file", "row_number")}
            amount = Amount(1, int(turns[row]), int(characters[row]))
            self._tally.set_aside(why.reason, Example(**origin, detail=why.detail), amount)
            self._refuse({**origin, "reason": why.reason, "detail": why.detail, "row": _as_row(record)})

    def _refuse(self, record: dict[str, Any]) -> None:
        line = {key: record[key] for key in ("dataset", "file", "row_number", "reason", "detail", "row")}
        self._quarantine.write(json.dumps(line, ensure_ascii=False) + "\n")


def _having(out: Path, shards: Sequence[Shard], pattern: str) -> Iterator[tuple[Path, Shard]]:
    """The shards that have such a file."""
    return ((shard.path(out, pattern), shard) for shard in shards if pattern in shard.files)


def _signatures(table: pa.Table) -> Signatures:
    column = table.column("signature").combine_chunks()
    return np.frombuffer(column.buffers()[1], np.uint8).reshape(-1, BINS)[column.offset :][: len(column)]


def _also_in_training(out: Path, shards: Sequence[Shard], ids: Sequence[str]) -> dict[int, Aside]:
    places: dict[str, list[int]] = {}
    for place, row_id in enumerate(ids):
        places.setdefault(row_id, []).append(place)
    there: set[str] = set()
    for path, _ in _having(out, shards, TRAIN):
        there |= places.keys() & read_parquet(path, ["row_id"]).column(0).to_pylist()
    why = Aside("also_in_training", "training has this conversation")
    return {place: why for row_id in there for place in places[row_id]}


def _near(out: Path, shards: Sequence[Shard], signatures: Signatures, threshold: float) -> Iterator[tuple[int, Aside]]:
    held_out = HeldOutSignatures(signatures, threshold)
    having = list(_having(out, shards, SIGNATURES))
    for first in range(0, len(having), SHARDS_AT_ONCE):
        group = having[first : first + SHARDS_AT_ONCE]
        parts = [np.load(path) for path, _ in group]
        ends = np.cumsum([len(part) for part in parts])
        matches = sorted(held_out.matches(np.concatenate(parts)), key=lambda match: match.training)
        for number, found in groupby(matches, key=lambda match: int(np.searchsorted(ends, match.training, "right"))):
            shard, zero = group[number][1], int(ends[number]) - len(parts[number])
            columns = read_parquet(shard.path(out, TRAIN), ["file", "row_number"])
            for match in found:
                origin = locate(columns.slice(match.training - zero, 1).to_pylist()[0], shard.place)
                detail = (
                    f"similarity {match.similarity:.2f} with {origin['file']} row {origin['row_number']} of "
                    f"{origin['dataset']}, which is trained"
                )
                yield match.held_out, Aside("near_duplicate", detail)


def _as_row(record: dict[str, Any]) -> str:
    """A conversation as JSON text, what is null left out."""
    messages = [{key: value for key, value in message.items() if value is not None} for message in record["messages"]]
    tools = {"tools": json.loads(record["tools"])} if record["tools"] else {}
    return json.dumps({"messages": messages, **tools}, ensure_ascii=False)
