"""Rows of tables as JSON text: CSV, Parquet, Arrow, and the mappings that a hub data set yields.

In: a binary file. Out: `RawRow`s; keys in column order, dates as ISO text, decimals as text, bytes as base64.
"""

import base64
import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from sft_core.errors import SourceError
from sft_core.fetch.json_rows import RawRow, decode_lines
from sft_core.fetch.shards import ROWS_PER_BATCH

LONGEST_FIELD = 1 << 30


def row_text(row: Mapping[str, Any]) -> str:
    """JSON text of a row of a table."""
    return json.dumps(row, ensure_ascii=False, default=_plain)


def _plain(value: object) -> str:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def read_csv(file: IO[bytes], label: str) -> Iterator[RawRow]:
    """Rows of a comma-separated file with a header; every value is text, an empty field is an empty text."""
    csv.field_size_limit(LONGEST_FIELD)  # the module's own limit is 128 KiB
    reader = csv.reader(decode_lines(file, label))
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            twice = sorted({name for name in header if header.count(name) > 1})
            raise SourceError(f"{label}: line 1 names these columns twice: {', '.join(map(repr, twice))}; rename one")
        begins = reader.line_num + 1
        for fields in reader:
            if len(fields) == len(header):
                yield RawRow(row_text(dict(zip(header, fields, strict=True))), begins)
            elif fields:
                problem = f"bad_csv_row: {len(fields)} fields, the header has {len(header)}"
                yield RawRow(json.dumps(fields, ensure_ascii=False), begins, problem)
            begins = reader.line_num + 1
    except csv.Error as error:
        raise SourceError(f"{label}: not CSV near line {reader.line_num}: {error}") from None


def read_parquet(file: IO[bytes]) -> Iterator[RawRow]:
    """Rows of a Parquet file."""
    return _number(pq.ParquetFile(file).iter_batches(batch_size=ROWS_PER_BATCH))


def read_arrow(file: IO[bytes]) -> Iterator[RawRow]:
    """Rows of an Arrow file, in the file layout or the stream layout that `datasets` writes."""
    if file.read(6) == b"ARROW1":
        reader = pa.ipc.open_file(file)
        return _number(reader.get_batch(number) for number in range(reader.num_record_batches))
    file.seek(0)
    return _number(pa.ipc.open_stream(file))


def _number(batches: Iterable[Any]) -> Iterator[RawRow]:
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            number += 1
            yield RawRow(row_text(row), number)
