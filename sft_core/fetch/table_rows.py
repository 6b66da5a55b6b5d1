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
from sft_core.fetch.arrow_values import ArrowValues
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


def number_rows(rows: Iterable[Mapping[str, Any]], values: ArrowValues | None = None) -> Iterator[RawRow]:
    """Numbered rows; one that holds a value without a JSON form keeps its other columns and says so. `values` knows the
    columns' types."""
    for number, row in enumerate(rows, start=1):
        dropped = 0
        if values:
            row, dropped = values.row(dict(row))  # noqa: PLW2901 - the same row, as JSON has it
        try:
            yield RawRow(row_text(row), number, dropped_nulls=dropped)
        except (TypeError, ValueError, RecursionError):
            yield _with_problem(row, number)


def number_dataset_rows(rows: Any) -> Iterator[RawRow]:
    """Numbered rows of a data set of `datasets`, whose images, sounds and videos stay as they are stored."""
    features = getattr(rows, "features", None)
    values = ArrowValues(features.arrow_schema, decoded=True) if features else None
    return number_rows(without_decoding(rows), values)


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
    lines = _Lines(decode_pieces(file, label))
    reader = csv.reader(lines)
    header = _header(reader, lines, label)
    begins = reader.line_num + 1
    while (fields := _fields(reader, lines, label)) is not None:
        if isinstance(fields, csv.Error):
            yield RawRow("".join(lines.taken), begins, f"bad_csv_row: {fields}")
        elif len(fields) == len(header):
            yield RawRow(row_text(dict(zip(header, fields, strict=True))), begins)
        elif fields:
            problem = f"bad_csv_row: {len(fields)} fields, the header has {len(header)}"
            yield RawRow(json.dumps(fields, ensure_ascii=False), begins, problem)
        begins = reader.line_num + 1


def _header(reader: Any, lines: "_Lines", label: str) -> list[str]:
    """The first line that is not blank."""
    header = _fields(reader, lines, label)
    while header == []:
        header = _fields(reader, lines, label)
    if isinstance(header, csv.Error):
        raise SourceError(f"{label}: not CSV near line {reader.line_num}: {header}; save the file as CSV again")
    twice = sorted({name for name in header or [] if (header or []).count(name) > 1})
    if twice:
        where = f"{label}: line {reader.line_num}"
        raise SourceError(f"{where} names these columns twice: {', '.join(map(repr, twice))}; rename one")
    return header or []


class _Lines:
    """Lines of a CSV file, and those of the row that is being read. `ended` once one was asked for behind the last."""

    def __init__(self, lines: Iterator[str]) -> None:
        self.taken: list[str] = []
        self.ended = False
        self._lines = lines

    def __iter__(self) -> Iterator[str]:
        for line in self._lines:
            self.taken.append(line)
            yield line
        self.ended = True


def _fields(reader: Any, lines: _Lines, label: str) -> list[str] | csv.Error | None:
    """The next row's fields, what is wrong with it, or None at the end."""
    begins = reader.line_num + 1
    lines.taken.clear()
    try:
        fields: list[str] | None = next(reader, None)
        if len(lines.taken) > 1:  # text behind a closing quote: it opened none, and rows would run together
            next(csv.reader(lines.taken, strict=not lines.ended))
    except csv.Error as error:
        return error
    if fields is not None and lines.ended:  # only a quote that is open makes the module ask for more than a line
        raise SourceError(
            f"{label}: the row that begins in line {begins} opens a quote that nothing closes, so the rest of the file "
            "is one field; close it, or write a quote inside of a field twice"
        )
    return fields
