"""Rows of tables as JSON text: CSV files, and the mappings that Parquet, Arrow and hub data sets yield.

In: a binary file, or mappings. Out: `RawRow`s; keys in column order, dates as ISO text, decimals and durations as text,
bytes as base64. What JSON cannot hold (a decoded image, a column without a JSON form) makes the row's problem
`not_text`, never a text such as `<PIL.Image at 0x7f...>`.
"""

import base64
import csv
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from typing import IO, Any
from uuid import UUID

from sft_core.bounds import KEPT_CHARACTERS, MOST_ROW_BYTES, nests_too_deeply
from sft_core.errors import SourceError
from sft_core.fetch.arrow_values import ArrowValues
from sft_core.fetch.json_rows import RawRow, decode_pieces, too_large
from sft_core.json_text import TOO_DEEP, may_nest

SHOWN = 10
"""Columns that an error names."""
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
            text = row_text(row)
        except (TypeError, ValueError, RecursionError):
            yield _with_problem(row, number)
            continue
        yield _checked(text, number, dropped)


def _checked(text: str, number: int, dropped: int) -> RawRow:
    if len(text) > MOST_ROW_BYTES:
        return RawRow(text[:KEPT_CHARACTERS], number, too_large(len(text)))
    if may_nest(text) and nests_too_deeply(json.loads(text)):
        return RawRow(text, number, f"not_json: {TOO_DEEP}")
    return RawRow(text, number, dropped_nulls=dropped)


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
    csv.field_size_limit(MOST_ROW_BYTES)  # the module's own limit is 128 KiB
    lines = _Lines(decode_pieces(_bounded_lines(file, label), label), label)
    reader = csv.reader(lines)
    header = _header(reader, lines, label)
    begins = reader.line_num + 1
    while (fields := _fields(reader, lines, label)) is not None:
        if isinstance(fields, csv.Error):
            yield RawRow("".join(lines.taken), begins, f"bad_csv_row: {fields}")
        elif len(fields) == len(header):
            yield _checked(row_text(dict(zip(header, fields, strict=True))), begins, 0)
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
    twice = names_twice(header or [])
    if twice:
        where = f"{label}: line {reader.line_num}"
        raise SourceError(f"{where} names these columns twice: {', '.join(map(repr, twice[:SHOWN]))}; rename one")
    return header or []


def names_twice(names: Iterable[str]) -> list[str]:
    """Columns that are named more than once.

    >>> names_twice(["a", "b", "a"])
    ['a']
    """
    return sorted(name for name, count in Counter(names).items() if count > 1)


def _bounded_lines(file: IO[bytes], label: str) -> Iterator[bytes]:
    for number, line in enumerate(iter(lambda: file.readline(MOST_ROW_BYTES + 1), b""), start=1):
        if len(line) > MOST_ROW_BYTES:
            raise _too_long(label, number)
        yield line


def _too_long(label: str, line: int) -> SourceError:
    return SourceError(
        f"{label}: the row that begins in line {line} is over {MOST_ROW_BYTES:,} bytes, the most a row may have; if a "
        "quote is open there, close it"
    )


class _Lines:
    """Lines of a CSV file, and those of the row that is being read. `ended` once one was asked for behind the last.
    SourceError where they are no row any more: where the next one begins cannot be known then."""

    def __init__(self, lines: Iterator[str], label: str) -> None:
        self.taken: list[str] = []
        self.ended = False
        self._lines, self._label, self._number, self._size = lines, label, 0, 0

    def clear(self) -> None:
        """The next row begins."""
        self.taken.clear()
        self._size = 0

    def __iter__(self) -> Iterator[str]:
        for line in self._lines:
            self._number += 1
            self._size += len(line)
            self.taken.append(line)
            if self._size > MOST_ROW_BYTES:
                raise _too_long(self._label, self._number - len(self.taken) + 1)
            yield line
        self.ended = True


def _fields(reader: Any, lines: _Lines, label: str) -> list[str] | csv.Error | None:
    """The next row's fields, what is wrong with it, or None at the end."""
    begins = reader.line_num + 1
    lines.clear()
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
