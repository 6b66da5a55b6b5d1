"""One shard of conversations to one shard of sequences.

In: `part-*.parquet` (row_id, messages, tools?, dataset, file, row_number). Out: row_id, input_ids, labels, in the order
of the rows. While a thread tokenises one batch (Rust, all cores, without Python's lock), this one renders the next and
labels the last; batches are taken in order, so the bytes are the same on any number of cores.
"""

import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sft_core.errors import DataError, RowError
from sft_core.pack.encoding import IGNORE_INDEX, Encoded, label_tokens, tokenize
from sft_core.pack.proof import PROVED_CONVERSATIONS, prove_row
from sft_core.pack.rendering import Rendering, render_conversation, tools_of
from sft_core.pack.tally import Counts, Tally
from sft_core.recipe import PackConfig

BATCH_ROWS = 1000
COMPRESSION = "zstd"
TOKENS = pa.list_(pa.int32())
SEQUENCE_SCHEMA = pa.schema([("row_id", pa.string()), ("input_ids", TOKENS), ("labels", TOKENS)])
Row = dict[str, Any]
Bounds = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Packing:
    """One run of the step: what rows are encoded with, and where the books and the quarantine are."""

    tokenizer: Any
    saved: Any
    template: str
    config: PackConfig
    quarantine: IO[str]
    tally: Tally = field(default_factory=Tally)


@dataclass(frozen=True, slots=True)
class _Batch:
    """Rows that the template took, the renderings of each, and their tokens to come."""

    rows: list[tuple[Row, list[Rendering]]]
    renderings: list[Rendering]
    encodings: "Future[list[Any]]"


def encode_shard(packing: Packing, shard: Path, target: Path) -> None:
    """Encode the rows of `shard` into `target`, and book them."""
    with pq.ParquetFile(shard) as file, pq.ParquetWriter(target, SEQUENCE_SCHEMA, compression=COMPRESSION) as writer:
        for batch in _tokenized_ahead(packing, file):
            encoded = label_tokens(batch.renderings, batch.encodings.result(), packing.tokenizer)
            writer.write_batch(_admit_batch(packing, batch.rows, encoded))


def _tokenized_ahead(packing: Packing, file: pq.ParquetFile) -> Iterator[_Batch]:
    """Batches of rows; when one is handed out, the next is rendered and being tokenised."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        ahead: _Batch | None = None
        for records in file.iter_batches(batch_size=BATCH_ROWS):
            rows = [(row, rendered) for row in records.to_pylist() if (rendered := _render(packing, row))]
            renderings = [rendering for _, rendered in rows for rendering in rendered]
            made = _Batch(rows, renderings, thread.submit(tokenize, renderings, packing.tokenizer))
            if ahead:
                yield ahead
            ahead = made
        if ahead:
            yield ahead


def _render(packing: Packing, row: Row) -> list[Rendering]:
    """Renderings of one row; none, and the row in quarantine, if the chat template has no place for it."""
    try:
        return render_conversation(row["messages"], packing.tokenizer, packing.template, tools=tools_of(row))
    except RowError as error:
        packing.tally.enter((1, 0, 0))
        _set_aside(packing, row, error.reason, (1, 0, 0), error.detail)
        return []


def _admit_batch(packing: Packing, rows: list[tuple[Row, list[Rendering]]], encoded: Encoded) -> Any:
    """The record batch of what is kept of one batch of rows."""
    starts = encoded.starts.tolist()
    row_ids: list[str] = []
    kept: list[Bounds] = []
    number = 0
    for row, renderings in rows:
        if packing.tally.proved < PROVED_CONVERSATIONS:
            sequences = [encoded.sequence(number + k) for k in range(len(renderings))]
            prove_row(row, renderings, sequences, packing.saved)
            packing.tally.proved += 1
        packing.tally.typed_rows += renderings[0].typed
        for _ in renderings:
            pieces = _admit(packing, row, encoded.labels, (starts[number], starts[number + 1]))
            row_ids += [row["row_id"]] * len(pieces)
            kept += pieces
            number += 1
    ends = np.cumsum([0, *(end - start for start, end in kept)])
    offsets = pa.array(ends, pa.int32())
    columns: list[Any] = [pa.array(row_ids, pa.string())]
    for tokens in (encoded.ids, encoded.labels):
        chosen = [tokens[start:end] for start, end in kept]
        values = tokens if ends[-1] == len(tokens) else np.concatenate([tokens[:0], *chosen])
        columns.append(pa.ListArray.from_arrays(offsets, pa.array(values, pa.int32())))
    return pa.record_batch(columns, schema=SEQUENCE_SCHEMA)


def _admit(packing: Packing, row: Row, labels: NDArray[np.int32], bounds: Bounds) -> list[Bounds]:
    """Where the sequences lie that are made of the one within `bounds`: one, several, or none once it is set aside."""
    start, end = bounds
    limit, overlong = packing.config.max_length, packing.config.overlong
    length, supervised = end - start, _supervised(labels, bounds)
    kept, border = [bounds], 0
    if length > limit:
        if overlong == "error":
            raise DataError(
                f"{row['dataset']}, {row['file']}, row {row['row_number']}: {length} tokens, pack.max_length "
                f"is {limit}; raise it, or set pack.overlong to quarantine, split or truncate"
            )
        if overlong == "quarantine":
            packing.tally.enter((1, length, supervised))
            _set_aside(packing, row, "overlong", (1, length, supervised))
            return []
        if overlong == "truncate":
            kept = [(start, start + limit)]
        else:
            kept = [(at, min(at + limit, end)) for at in range(start, end, limit)]
            border = supervised
            labels[start + limit : end : limit] = IGNORE_INDEX  # nothing before it in its row predicts it
            border -= _supervised(labels, bounds)
    left = [_supervised(labels, piece) for piece in kept]
    if not sum(left):
        packing.tally.enter((1, length, supervised))
        _set_aside(packing, row, "no_supervised_token", (1, length, supervised))
        return []
    packing.tally.enter((len(kept), length, supervised))
    packing.tally.split += len(kept) > 1
    if border:
        packing.tally.drop("split_border", (0, 0, border))
    if overlong == "truncate" and length > limit:
        packing.tally.drop("truncated", (0, length - limit, supervised - sum(left)))
    for (first, last), count in zip(kept, left, strict=True):
        packing.tally.keep(last - first, count)
    return kept


def _set_aside(packing: Packing, row: Row, reason: str, counts: Counts, detail: str = "") -> None:
    packing.tally.drop(reason, counts)
    entry = {key: row[key] for key in ("row_id", "dataset", "file", "row_number")}
    entry |= {"reason": reason, "tokens": counts[1]} | ({"detail": detail} if detail else {})
    packing.quarantine.write(json.dumps(entry, ensure_ascii=False) + "\n")


def _supervised(labels: NDArray[np.int32], bounds: Bounds) -> int:
    return int(np.count_nonzero(labels[slice(*bounds)] != IGNORE_INDEX))
