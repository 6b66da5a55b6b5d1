"""One shard of conversations to one shard of sequences.

In: `part-*.parquet` (row_id, messages, tools?, dataset?, file, row_number). Out: `sequences/*.parquet` (row_id,
input_ids, labels, in the order of the rows), `refused/*.jsonl` where rows were set aside (row_id, reason, tokens,
detail, file and row_number as in the shard) and the shard's books. A batch of rows at a time: a shard that another tool
wrote may be of any size.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sft_core.errors import DataError, RowError
from sft_core.pack.encoding import IGNORE_INDEX, EncodedRows, encode_rows
from sft_core.pack.rendering import Rendering, render_conversation
from sft_core.pack.renders import tools_of
from sft_core.pack.tally import Counts, Tally
from sft_core.pack.template import drops_reasoning
from sft_core.pack.thoughts import EMPTY, drop_thoughts
from sft_core.pack.tokenizer import SavedTokenizer, load_saved_tokenizer
from sft_core.panics import panics_told
from sft_core.shard_rows import locate
from sft_core.shards import Made

BATCH_ROWS = 1000
COMPRESSION = "zstd"
TOKENS = pa.list_(pa.int32())
SEQUENCE_SCHEMA = pa.schema(
    [("row_id", pa.string()), ("input_ids", TOKENS), ("labels", TOKENS), ("length", pa.int32())]
)
"""`length`, in tokens, spares packing the tokens."""
SEQUENCE_FILES = "sequences/*.parquet"
REFUSED_FILES = "refused/*.jsonl"
ORIGIN = ("row_id", "dataset", "file", "row_number")
Row = dict[str, Any]
Bounds = tuple[int, int]


@dataclass(frozen=True, slots=True)
class ShardTask:
    """One shard to encode, and with what: the tokenizer as the step saved it, known by the hash of its files."""

    path: Path
    place: dict[str, Any]
    tokenizer: Path
    tokenizer_hash: str
    trust_remote_code: bool
    chat_template: str
    max_length: int
    overlong: str


def encode_shard(task: ShardTask) -> Made:
    """Encode the shard's rows. DataError for an overlong row if that is to be an error, ModelError if the tokenizer's
    library fails."""
    with panics_told(str(task.tokenizer)):
        return _encode(task)


def _encode(task: ShardTask) -> Made:
    saved = SavedTokenizer(task.tokenizer, task.tokenizer_hash, task.trust_remote_code)
    work = _Work(task, load_saved_tokenizer(saved))
    sink = pa.BufferOutputStream()
    with (
        pq.ParquetFile(task.path) as shard,
        pq.ParquetWriter(sink, SEQUENCE_SCHEMA, compression=COMPRESSION) as writer,
    ):
        for records in shard.iter_batches(batch_size=BATCH_ROWS):
            rows = [(row, rendered) for row in records.to_pylist() if (rendered := work.render(row))]
            writer.write_batch(work.admit(rows, encode_rows([r for _, r in rows], work.tokenizer)))
    files = {SEQUENCE_FILES: sink.getvalue().to_pybytes()}
    if work.refused:
        files[REFUSED_FILES] = "".join(work.refused).encode()
    return Made(files, work.tally.facts())


@dataclass(slots=True)
class _Work:
    """The books and the refused rows of one shard in the making."""

    task: ShardTask
    tokenizer: Any
    tally: Tally = field(default_factory=Tally)
    refused: list[str] = field(default_factory=list)
    reasons: dict[int, str] = field(default_factory=dict)
    """By `id` of a row of the batch at hand: why a sequence of it was set aside, the first one."""

    def render(self, row: Row) -> list[Rendering]:
        """Renderings of one row; none, and the row set aside, if the chat template has no place for it."""
        messages, template = row["messages"], self.task.chat_template
        try:
            renderings = render_conversation(messages, self.tokenizer, template, tools=tools_of(row))
        except RowError as error:
            self._set_aside(row, error.reason, (1, 0, 0), error.detail)
            self.tally.count_rows(1, [error.reason])
            return []
        if drops_reasoning(template):
            self.tally.dropped_thoughts += drop_thoughts(messages)[1]
        self.tally.empty_thoughts += sum(
            EMPTY.match(rendering.text, span.start) is not None for rendering in renderings for span in rendering.spans
        )
        return renderings

    def admit(self, rows: Sequence[tuple[Row, list[Rendering]]], made: EncodedRows) -> Any:
        """The record batch of what is kept of one batch of rows."""
        encoded = made.encoded
        self.reasons.clear()
        self.tally.parted_turns += made.parted_turns
        self.tally.typed_rows += sum(renderings[0].typed for _, renderings in rows)
        lengths, supervised = np.diff(encoded.starts), _supervised(encoded.labels, encoded.starts)
        whole = (lengths <= self.task.max_length) & (supervised > 0)
        counts = (int(whole.sum()), int(lengths[whole].sum()), int(supervised[whole].sum()))
        self.tally.enter(counts)
        self.tally.keep(counts)
        owners = []
        for (row, _), count in zip(rows, made.counts, strict=True):
            if isinstance(count, RowError):
                self._set_aside(row, count.reason, (1, 0, 0), count.detail)
            else:
                owners += [row] * count
        bounds = zip(encoded.starts[:-1].tolist(), encoded.starts[1:].tolist(), strict=True)
        row_ids: list[str] = []
        kept: list[Bounds] = []
        going_on: set[int] = set()
        for row, is_whole, place in zip(owners, whole.tolist(), bounds, strict=True):
            pieces = [place] if is_whole else self._cut(row, encoded.labels, place)
            row_ids += [row["row_id"]] * len(pieces)
            kept += pieces
            if pieces:
                going_on.add(id(row))
        gone = [self.reasons[id(row)] for row, _ in rows if id(row) not in going_on]
        self.tally.count_rows(len(rows), gone)
        ends = np.cumsum([0, *(end - start for start, end in kept)])
        columns: list[Any] = [pa.array(row_ids, pa.string())]
        for tokens in (encoded.ids, encoded.labels):
            chosen = [tokens[:0], *(tokens[start:end] for start, end in kept)]
            values = tokens if ends[-1] == len(tokens) else np.concatenate(chosen)
            columns.append(pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(values, pa.int32())))
        columns.append(pa.array(np.diff(ends), pa.int32()))
        return pa.record_batch(columns, schema=SEQUENCE_SCHEMA)

    def _cut(self, row: Row, labels: NDArray[np.int32], bounds: Bounds) -> list[Bounds]:
        """Where the sequences lie that are made of the one within `bounds`, which is overlong or has nothing to train:
        one, several, or none once it is set aside."""
        start, end = bounds
        limit, overlong = self.task.max_length, self.task.overlong
        length, (supervised,) = end - start, _supervised(labels, bounds).tolist()
        kept, border = [bounds], 0
        if length > limit:
            if overlong == "error":
                row = locate(row, self.task.place)
                raise DataError(
                    f"{row['dataset']}, {row['file']}, row {row['row_number']}: {length} tokens, pack.max_length "
                    f"is {limit}; raise it, or set pack.overlong to quarantine, split or truncate"
                )
            if overlong == "quarantine":
                self._set_aside(row, "overlong", (1, length, supervised))
                return []
            if overlong == "truncate":
                kept = [(start, start + limit)]
            else:
                kept = [(at, min(at + limit, end)) for at in range(start, end, limit)]
                labels[start + limit : end : limit] = IGNORE_INDEX  # nothing before it in its row predicts it
                border = supervised - int(_supervised(labels, bounds)[0])
        left = sum(int(_supervised(labels, piece)[0]) for piece in kept)
        if not left:
            self._set_aside(row, "no_supervised_token", (1, length, supervised))
            return []
        tokens = sum(last - first for first, last in kept)
        self.tally.enter((len(kept), length, supervised))
        self.tally.keep((len(kept), tokens, left))
        self.tally.split += len(kept) > 1
        if border:
            self.tally.drop("split_border", (0, 0, border))
        if tokens < length:
            self.tally.drop("truncated", (0, length - tokens, supervised - left))
        return kept

    def _set_aside(self, row: Row, reason: str, counts: Counts, detail: str = "") -> None:
        self.tally.enter(counts)
        self.tally.drop(reason, counts)
        self.reasons.setdefault(id(row), reason)
        origin = {key: row[key] for key in ORIGIN if key in row}
        entry = {**origin, "reason": reason, "tokens": counts[1], **({"detail": detail} if detail else {})}
        self.refused.append(json.dumps(entry, ensure_ascii=False) + "\n")


def _supervised(labels: NDArray[np.int32], starts: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    """Trained tokens between one start and the next, the last one the end."""
    before = np.concatenate([[0], np.cumsum(labels[starts[0] : starts[-1]] != IGNORE_INDEX)])
    return np.diff(before[np.asarray(starts) - starts[0]])
