"""The shards of a `RawDataset`, taken from the earlier artifact or made from rows.

In: a JSON Lines file's bytes, or a group of files (or a hub's data set) that knows how to read its rows. Out:
`rows/part-*.parquet`. Lines are known by their bytes: a block that the earlier artifact holds is not parsed. A group is
known by its files' hashes: when none changed, none is read.
"""

import hashlib
import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sft_core.fetch.cuts import cut, mark_last
from sft_core.fetch.json_rows import RawRow, read_lines
from sft_core.fetch.lines import LongLine, split_lines, without_bom
from sft_core.fingerprint import hash_value
from sft_core.shards import Earlier, Made, ShardWriter

STEP_VERSION = 5
ROWS = "rows/*.parquet"
RAW_SCHEMA = pa.schema(
    [("row", pa.string()), ("file", pa.int32()), ("row_number", pa.int64()), ("problem", pa.string())]
)
"""`file` is an index into the `files` of the shard's place, `row_number` counts from its `first_row`."""
FiledRow = tuple[int, RawRow]
"""A row and the index of its file."""


@dataclass(frozen=True, slots=True)
class RowGroup:
    """What is taken as a whole or read as a whole. `content`, JSON-able, decides the rows that `read` yields."""

    labels: list[str]
    content: Any
    read: Callable[[], Iterator[FiledRow]]


class RawShards:
    """The shards of one fetched data set, in the order in which they come."""

    def __init__(self, out: Path, earlier: Earlier) -> None:
        self._writer, self._earlier = ShardWriter(out, earlier), earlier

    def total(self, fact: str) -> int:
        """Sum of a fact over the shards: `rows`, `rows_with_problem`, `dropped_nulls`."""
        return sum(shard.facts[fact] for shard in self._writer.shards)

    def close(self) -> None:
        """Write `shards.json`."""
        self._writer.close()

    def add_lines(self, label: str, pieces: Iterable[bytes]) -> None:
        """A JSON Lines file, block by block."""
        first_row = 0
        for lines in cut(without_bom(split_lines(pieces)), bytes):
            place = {"files": [label], "first_row": first_row}
            long = [line.sha256 for line in lines if isinstance(line, LongLine)]
            key = _key("lines", hashlib.sha256(b"".join(lines)).hexdigest(), *long)
            if not self._writer.take(key, place):
                self._write(key, [(0, raw) for raw in read_lines(lines, first_row)], place)
            first_row += len(lines)

    def add_group(self, group: RowGroup) -> None:
        """All rows of a group: its shards from the first to the one whose key says that it is the last."""
        taken = 0
        while self._take(group, taken, is_last=False):
            taken += 1
        if self._take(group, taken, is_last=True):
            return
        for index, (rows, is_last) in enumerate(mark_last(cut(group.read(), _row_bytes))):
            if index < taken or self._take(group, index, is_last):
                continue
            first_row = 0 if len(group.labels) > 1 else rows[0][1].row_number - 1
            place = {"files": group.labels, "first_row": first_row}
            self._write(_group_key(group, index, is_last), rows, place)

    def _take(self, group: RowGroup, index: int, is_last: bool) -> bool:
        key = _group_key(group, index, is_last)
        found = self._earlier.find(key)
        return found is not None and self._writer.take(key, {**found.place, "files": group.labels})

    def _write(self, key: str, rows: list[FiledRow], place: dict[str, Any]) -> None:
        if not rows:  # blank lines
            return
        columns = {
            "row": [raw.row for _, raw in rows],
            "file": [file for file, _ in rows],
            "row_number": [raw.row_number - place["first_row"] for _, raw in rows],
            "problem": [raw.problem for _, raw in rows],
        }
        shard = io.BytesIO()
        pq.write_table(pa.table(columns, schema=RAW_SCHEMA), shard, compression="zstd")
        facts = {
            "rows": len(rows),
            "rows_with_problem": sum(raw.problem is not None for _, raw in rows),
            "dropped_nulls": sum(raw.dropped_nulls for _, raw in rows),
        }
        self._writer.write(key, Made({ROWS: shard.getvalue()}, facts), place)


def _group_key(group: RowGroup, index: int, is_last: bool) -> str:
    return _key("group", group.content, index, is_last)


def _key(*content: Any) -> str:
    """Parquet bytes are pyarrow's: another version of it takes nothing from the last one's shards."""
    return hash_value([*content, STEP_VERSION, pa.__version__])


def _row_bytes(row: FiledRow) -> bytes:
    return row[1].row.encode("utf-8", "surrogatepass")
