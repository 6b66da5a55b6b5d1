"""Parquet shards: `part-00000.parquet`, `part-00001.parquet` ...

In: rows as dicts. Out: files of at most ROWS_PER_SHARD rows or about BYTES_PER_SHARD of text, and the rows back again.
The bytes depend on the rows, the schema and pyarrow's version only.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

ROWS_PER_SHARD = 50_000
BYTES_PER_SHARD = 64_000_000
ROWS_PER_BATCH = 1_000
RAW_SCHEMA = pa.schema(
    [("row", pa.string()), ("file", pa.string()), ("row_number", pa.int64()), ("problem", pa.string())]
)


class ShardWriter:
    """Collects rows and writes a shard whenever enough have come; `close` writes the rest."""

    def __init__(self, folder: Path, schema: pa.Schema) -> None:
        self.folder = folder
        self.schema = schema
        self.rows = 0
        self._shards = 0
        self._pending: list[Mapping[str, Any]] = []
        self._pending_bytes = 0

    def add(self, row: Mapping[str, Any], size: int) -> None:
        """Append one row; `size` is about its bytes of text."""
        self._pending.append(row)
        self._pending_bytes += size
        self.rows += 1
        if len(self._pending) >= ROWS_PER_SHARD or self._pending_bytes >= BYTES_PER_SHARD:
            self._write()

    def close(self) -> None:
        """Write what is left."""
        if self._pending:
            self._write()

    def _write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        table = pa.Table.from_pylist(self._pending, schema=self.schema)
        pq.write_table(table, self.folder / f"part-{self._shards:05d}.parquet", compression="zstd")
        self._shards += 1
        self._pending, self._pending_bytes = [], 0


def read_shards(folder: Path) -> Iterator[dict[str, Any]]:
    """Rows of all shards of a folder, in order, a batch at a time."""
    for path in sorted(folder.glob("part-*.parquet")):
        with pq.ParquetFile(path) as shard:
            for batch in shard.iter_batches(batch_size=ROWS_PER_BATCH):
                yield from batch.to_pylist()
