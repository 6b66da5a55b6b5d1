"""Rows of shards: where a shard ends, and its rows read back with their origin.

In: rows, or a folder of `part-*.parquet`. Out: borders that depend on content alone; rows as dicts, their `file` and
`row_number` as in the source (see `place` in `sft_core.shards`).
"""

import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import pyarrow.parquet as pq

from sft_core.shards import read_shard_list

ROWS_PER_CUT = 2048
"""One row in so many ends a shard, by its content."""
LEAST_ROWS, MOST_ROWS = 512, 8192
MOST_BYTES = 32_000_000
ROWS_PER_BATCH = 1_000


class Cutter:
    """Says after which row a shard ends, by the rows' content alone: an inserted row moves no border but its own.

    A row ends a shard when its CRC-32 is a multiple of ROWS_PER_CUT and the shard has LEAST_ROWS; a shard of MOST_ROWS
    or MOST_BYTES ends in any case. (Content-defined chunking as in LBFS, Muthitacharoen et al., SOSP 2001, with rows
    for bytes.)
    """

    def __init__(self) -> None:
        self._rows = self._bytes = 0

    def ends_after(self, row: bytes) -> bool:
        """Whether the shard ends with this row."""
        self._rows += 1
        self._bytes += len(row)
        by_content = self._rows >= LEAST_ROWS and zlib.crc32(row) % ROWS_PER_CUT == 0
        ends = by_content or self._rows >= MOST_ROWS or self._bytes >= MOST_BYTES
        if ends:
            self._rows = self._bytes = 0
        return ends


def read_shards(folder: Path) -> Iterator[dict[str, Any]]:
    """Rows of all shards of a folder (`rows`, `train`), in order, a batch at a time."""
    places = {shard.name: shard.place for shard in read_shard_list(folder.parent)}
    for path in sorted(folder.glob("part-*.parquet")):
        yield from read_shard(path, places.get(path.stem, {}))


def read_shard(path: Path | IO[bytes], place: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Rows of one shard, located."""
    with pq.ParquetFile(path) as shard:
        for batch in shard.iter_batches(batch_size=ROWS_PER_BATCH):
            for row in batch.to_pylist():
                yield locate(row, place)


def locate(row: dict[str, Any], place: Mapping[str, Any]) -> dict[str, Any]:
    """A row whose `file` and `row_number` (and `dataset`) are those of the source. Rows that name their file already,
    as the held-out side's do, stay as they are.

    >>> locate({"row": "{}", "file": 0, "row_number": 3}, {"files": ["a.jsonl"], "first_row": 100})
    {'row': '{}', 'file': 'a.jsonl', 'row_number': 103}
    """
    if not isinstance(row.get("file"), int):
        return row
    origin = {"file": place["files"][row["file"]], "row_number": row["row_number"] + place["first_row"]}
    return {**row, **({"dataset": place["dataset"]} if "dataset" in place else {}), **origin}
