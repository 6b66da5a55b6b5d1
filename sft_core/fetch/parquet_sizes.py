"""What a Parquet file expands to, told before it is decoded.

In: an opened Parquet file. Out: the columns whose dictionary may repeat values so often that a batch of rows could not
be held; they are to be read as dictionaries, and measured by `arrow_sizes`. SourceError for pages that expand beyond
`bounds`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from sft_core.bounds import BATCH_BYTES, MOST_EXPANSION, allowed
from sft_core.errors import SourceError
from sft_core.fetch.arrow_sizes import sizes_of
from sft_core.fetch.parquet_pages import pages_of
from sft_core.shard_rows import ROWS_PER_BATCH

VALUE_BYTES = 16
"""Of a value in memory that takes nothing in the file, such as a null among many."""


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A column's part of row group `group`. `values`: those that refer to its dictionary, in one batch at most."""

    path: str
    group: int
    dictionary: int
    values: int
    expanded: int


def repeating_columns(table: pq.ParquetFile, file: IO[bytes], label: str) -> list[str]:
    """Paths of the columns to read as dictionaries."""
    columns = [table.schema.column(number) for number in range(len(table.schema))]
    nested = {column.path: column.max_repetition_level > 0 for column in columns}
    found: set[str] = set()
    for number in range(table.metadata.num_row_groups):
        group = table.metadata.row_group(number)
        stored = [group.column(at) for at in range(group.num_columns)]
        if strange := [chunk.path_in_schema for chunk in stored if chunk.path_in_schema not in nested]:
            raise SourceError(
                f"{label}: damaged: row group {number} has a column {strange[0]!r}, which the schema lacks"
            )
        chunks = [_measured(file, chunk, number, nested[chunk.path_in_schema], label) for chunk in stored]
        expanded, size = sum(chunk.expanded for chunk in chunks), sum(chunk.total_compressed_size for chunk in stored)
        if expanded > allowed(size):
            raise SourceError(
                f"{label}: row group {number} has {size:,} bytes and expands to {expanded:,}, over {MOST_EXPANSION} "
                "times as many; no real rows do that. If these do, write it with smaller row groups"
            )
        limit = BATCH_BYTES / max(len(chunks), 1)
        at_risk = [chunk for chunk in chunks if chunk.values * chunk.dictionary > limit and chunk.path not in found]
        found |= {chunk.path for chunk in at_risk if chunk.values * _longest_in(file, chunk) > limit}
    return sorted(found)


def _measured(file: IO[bytes], chunk: Any, group: int, nested: bool, label: str) -> _Chunk:
    pages = list(pages_of(file, chunk, label))
    expanded = sum(page.size for page in pages)
    if nested:  # one row may hold all of them
        expanded = max(expanded, VALUE_BYTES * sum(page.values for page in pages if not page.is_dictionary))
    values = sum(page.values for page in pages if page.by_dictionary)
    text = chunk.physical_type == "BYTE_ARRAY"
    dictionary = max((page.size for page in pages if page.is_dictionary), default=0) if text else 0
    return _Chunk(chunk.path_in_schema, group, dictionary, values if nested else min(values, ROWS_PER_BATCH), expanded)


def _longest_in(file: IO[bytes], chunk: _Chunk) -> float:
    """Bytes of the longest value in a chunk's dictionary."""
    file.seek(0)
    table = pq.ParquetFile(file, pre_buffer=False, read_dictionary=[chunk.path])
    batch = next(table.iter_batches(batch_size=1, row_groups=[chunk.group], columns=[chunk.path]), None)
    return max((sizes_of(found).max(initial=0) for found in _dictionaries(batch.columns if batch else [])), default=0)


def _dictionaries(columns: list[Any]) -> Iterator[Any]:
    for column in columns:
        if pa.types.is_dictionary(column.type):
            yield column.dictionary
        elif pa.types.is_struct(column.type):
            yield from _dictionaries([column.field(number) for number in range(column.type.num_fields)])
        elif pa.types.is_map(column.type):
            yield from _dictionaries([column.keys, column.items])
        elif hasattr(column, "values"):
            yield from _dictionaries([column.values])
