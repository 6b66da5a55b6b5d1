"""The work on one shard: raw rows in, conversations of both sides and the rows set aside out.

In: a `ShardWork` that names a shard of fetch and what decides the fate of its rows. Out: `Made`, with the files below
and the facts that `Tally.add_shard` reads. Nothing in it says where the rows stand in the source: `file` is an index,
`row_number` counts from the shard's `first_row`. A file that would hold nothing is not written.

train/*.parquet        conversations of the training side, LOCAL_SCHEMA
signatures/*.npy       their signatures, (rows, BINS) bytes (see `sketch`)
candidates/*.parquet   those that fall to the held-out side, LOCAL_SCHEMA and `signature`
refused/*.jsonl        rows set aside: reason, detail, row, file, row_number
"""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sft_core.account import NO_FAULT
from sft_core.errors import RowError
from sft_core.normalize.conversation import Conversation, Message, content_digest
from sft_core.normalize.load import load_map_fn, shipped_name
from sft_core.normalize.reads import suggest_map_fns, unread_columns
from sft_core.normalize.rows import MapFn, convert_row, is_held_out, is_sampled, prove_repeatable, read_row
from sft_core.normalize.sketch import BINS, sketch, text_of
from sft_core.normalize.tables import LOCAL_SCHEMA, messages_column, parquet_bytes, sizes
from sft_core.normalize.tally import DETAIL_CHARACTERS, Amount, ShardExample, ShardTally
from sft_core.shard_rows import ROWS_PER_BATCH
from sft_core.shards import Made

TRAIN, SIGNATURES = "train/*.parquet", "signatures/*.npy"
CANDIDATES, REFUSED = "candidates/*.parquet", "refused/*.jsonl"
CALLED_TWICE = 8
"""Rows of each shard by which a user's map_fn shows that it depends on the row alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardWork:
    """One raw shard and what decides the fate of its rows. `call` names the run: a user's map_fn is loaded once in it.
    `eval_fraction` is 1 for a data set that is held out as a whole."""

    path: Path
    map_fn: str
    eval_fraction: float
    weight: float
    seed: int
    call: str


@lru_cache(maxsize=64)
def load_once(map_fn: str, call: str) -> MapFn:
    """The function of that name, loaded once in a process for each `call`."""
    return load_map_fn(map_fn)


def make_shard(work: ShardWork) -> Made:
    """Normalize one shard."""
    return _Shard(work).made()


class _Shard:
    """A shard's rows, sorted as they come."""

    def __init__(self, work: ShardWork) -> None:
        self._work = work
        self._map_fn = load_once(work.map_fn, work.call)
        self._tally = ShardTally()
        self._kept: list[tuple[str, Conversation, int, int]] = []
        self._held: list[bool] = []
        self._refused: list[str] = []

    def made(self) -> Made:
        """All files and facts."""
        own = shipped_name(self._work.map_fn) is None
        for number, record in enumerate(_records(self._work.path)):
            if own and number < CALLED_TWICE:
                prove_repeatable(record, self._map_fn, self._work.map_fn)
            self._take(record)
        table = self._table()
        signatures = sketch(text_of(conversation.messages) for _, conversation, _, _ in self._kept)
        held = np.array(self._held, bool)
        train = table.filter(pa.array(~held))
        turns, characters = sizes(train)
        self._tally.train = Amount(len(train), int(turns.sum()), int(characters.sum()))
        files: dict[str, bytes] = {}
        if len(train):
            files |= {TRAIN: parquet_bytes(train), SIGNATURES: _npy(signatures[~held])}
        if held.any():
            column = pa.FixedSizeBinaryArray.from_buffers(
                pa.binary(BINS), int(held.sum()), [None, pa.py_buffer(signatures[held].tobytes())]
            )
            files[CANDIDATES] = parquet_bytes(table.filter(pa.array(held)).append_column("signature", column))
        if self._refused:
            files[REFUSED] = "".join(self._refused).encode("utf-8")
        return Made(files, self._tally.as_facts())

    def _take(self, record: dict[str, Any]) -> None:
        tally = self._tally
        try:
            row = read_row(record)
            tally.unread.update(unread_columns(row, self._map_fn))
            conversation = convert_row(row, self._map_fn)
        except RowError as error:
            tally.came += Amount(1)
            self._set_aside(record, error, Amount(1))
            return
        amount = _amount(conversation.messages)
        tally.came += amount
        digest = content_digest(conversation.messages, conversation.tools)
        if is_sampled(digest, self._work.weight, self._work.seed):
            self._kept.append((digest.hex()[:32], conversation, record["file"], record["row_number"]))
            self._held.append(is_held_out(digest, self._work.eval_fraction))
        else:
            self._set_aside(record, RowError("not_sampled", f"weight {self._work.weight}"), amount)

    def _set_aside(self, record: dict[str, Any], error: RowError, amount: Amount) -> None:
        detail = error.detail.encode("utf-8", "backslashreplace").decode("utf-8")
        self._tally.set_aside[error.reason] += amount
        origin = {"file": record["file"], "row_number": record["row_number"]}
        if error.reason not in self._tally.examples:
            fitting = _fitting(record["row"]) if error.reason not in NO_FAULT else ()
            example = ShardExample(**origin, detail=detail[:DETAIL_CHARACTERS], fitting=fitting)
            self._tally.examples[error.reason] = example
        if error.reason != "not_sampled":
            line = {"reason": error.reason, "detail": detail, "row": record["row"], **origin}
            self._refused.append(json.dumps(line, ensure_ascii=False) + "\n")

    def _table(self) -> pa.Table:
        """All kept rows, LOCAL_SCHEMA."""
        ids, conversations, files, numbers = zip(*self._kept, strict=True) if self._kept else ((), (), (), ())
        messages = messages_column([conversation.messages for conversation in conversations])
        tools = pa.array([conversation.tools for conversation in conversations], pa.string())
        columns = [pa.array(ids, pa.string()), messages, tools, pa.array(files, pa.int32())]
        return pa.Table.from_arrays([*columns, pa.array(numbers, pa.int64())], schema=LOCAL_SCHEMA)


def _records(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a raw shard as they stand there."""
    with pq.ParquetFile(path) as shard:
        for batch in shard.iter_batches(batch_size=ROWS_PER_BATCH):
            yield from batch.to_pylist()


def _amount(messages: list[Message]) -> Amount:
    answers = sum(message["weight"] is not None for message in messages)
    characters = sum(len(message["content"]) + len(message.get("reasoning_content") or "") for message in messages)
    return Amount(1, answers, characters)


def _fitting(text: str) -> tuple[str, ...]:
    """The map_fns that a row's columns fit; none where it is not JSON."""
    try:
        return suggest_map_fns(json.loads(text))
    except (ValueError, RecursionError):
        return ()


def _npy(array: np.ndarray[Any, Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()
