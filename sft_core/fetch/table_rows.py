"""Rows of tables as JSON text: CSV files, and the mappings that Parquet, Arrow and hub data sets yield.

In: a binary file, or mappings. Out: `RawRow`s; keys in column order, dates as ISO text, decimals and durations as text,
bytes as base64. What JSON cannot hold (a decoded image, a column without a JSON form) makes the row's problem
`not_text`, never a text such as `<PIL.Image at 0x7f...>`.
"""

import base64
import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from typing import IO, Any
from uuid import UUID

from sft_core.errors import SourceError
from sft_core.fetch.json_rows import RawRow, decode_pieces

LONGEST_FIELD = 1 << 30
MEDIA = frozenset({"Image", "Audio", "Video", "Pdf", "Nifti"})
"""Features of `datasets` that are stored as bytes or a path and decoded when a row is read."""


class NotTextError(TypeError):
    """A value that has no JSON text."""


def row_text(row: Mapping[str, Any]) -> str:
    """JSON text of a row of a table.

    >>> row_text({"a": b"x", "b": [None, 1.5]})
    '{"a": "eA==", "b": [null, 1.5]}'
    """
    return json.dumps(row, ensure_ascii=False, default=_plain)


def number_rows(rows: Iterable[Mapping[str, Any]]) -> Iterator[RawRow]:
    """Numbered rows; one that holds a value without a JSON form keeps its other columns and says so."""
    for number, row in enumerate(rows, start=1):
        try:
            yield RawRow(row_text(row), number)
        except (TypeError, ValueError, RecursionError):
            yield _with_problem(row, number)


def _with_problem(row: Mapping[str, Any], number: int) -> RawRow:
    kept, problem = dict(row), ""
    for name, value in row.items():
        try:
            row_text({name: value})
        except (TypeError, ValueError, RecursionError) as error:
            problem = problem or f"not_text: column {name!r}: {error}"
            kept[name] = None
    return RawRow(row_text(kept), number, problem)


def without_decoding(rows: Any) -> Any:
    """A `datasets` data set whose images, sounds and videos stay the bytes and paths they are stored as."""
    for name, feature in (getattr(rows, "features", None) or {}).items():
        if type(feature).__name__ in MEDIA and feature.decode:
            rows = rows.cast_column(name, replace(feature, decode=False))
    return rows


def _plain(value: object) -> str:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    if hasattr(value, "isoformat"):
        return str(value.isoformat())
    if isinstance(value, Decimal | timedelta | UUID):
        return str(value)
    raise NotTextError(f"a {type(value).__module__}.{type(value).__qualname__}, which JSON cannot hold")


def read_csv(file: IO[bytes], label: str) -> Iterator[RawRow]:
    """Rows of a comma-separated file with a header; every value is text, an empty field is an empty text."""
    csv.field_size_limit(LONGEST_FIELD)  # the module's own limit is 128 KiB
    reader = csv.reader(decode_pieces(file, label))
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
        raise SourceError(
            f"{label}: not CSV near line {reader.line_num}: {error}; mend that line or save the file as CSV again"
        ) from None
