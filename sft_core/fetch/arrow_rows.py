"""Rows of Parquet and Arrow files, a thousand at a time: memory depends on a row's size, not on the file's. A row's
size is known before it is decoded (`arrow_sizes`, `parquet_sizes`).

Arrow files are mapped: their pages count as resident until the system wants them back, and are no growth of the heap.

In: a local file that is not compressed. Out: `RawRow`s. A value that Python cannot hold (a date after the year 9999,
text that is not UTF-8) makes its row's problem; the row then holds the value's number or its escaped bytes.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from sft_core.bounds import BATCH_BYTES, KEPT_CHARACTERS, MOST_ROW_BYTES
from sft_core.errors import SourceError
from sft_core.fetch.arrow_sizes import row_sizes, sizes_of
from sft_core.fetch.arrow_values import ArrowValues
from sft_core.fetch.json_rows import RawRow, too_large
from sft_core.fetch.parquet_sizes import repeating_columns
from sft_core.fetch.table_rows import SHOWN, names_twice, number_rows
from sft_core.shard_rows import ROWS_PER_BATCH

PARQUET_BUFFER_BYTES = 1 << 16
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
TEXT = (pa.types.is_string, pa.types.is_large_string)


def read_parquet(path: Path, label: str) -> Iterator[RawRow]:
    """Rows of a Parquet file, column chunks buffered piece by piece."""
    with path.open("rb") as file:  # a file object: pyarrow's own file keeps all pages that it has mapped
        table = _open_parquet(file, [])
        _check_columns(table.schema_arrow, label)
        schema, repeating = table.schema_arrow, repeating_columns(table, file, label)
        if repeating:  # slower; what repeats stays stored once until its size is known
            table = _open_parquet(file, repeating)
        yield from _number(table.iter_batches(batch_size=ROWS_PER_BATCH), schema)


def _open_parquet(file: IO[bytes], as_dictionaries: list[str]) -> Any:
    file.seek(0)
    return pq.ParquetFile(
        file, pre_buffer=False, buffer_size=PARQUET_BUFFER_BYTES, read_dictionary=as_dictionaries or None
    )


def read_arrow(path: Path, label: str) -> Iterator[RawRow]:
    """Rows of an Arrow file, in the file layout or the stream layout that `datasets` writes."""
    with pa.memory_map(str(path)) as file:
        if file.read(6) == b"ARROW1":
            whole = pa.ipc.open_file(file)
            _check_columns(whole.schema, label)
            yield from _number(
                _checked(whole.get_batch(number) for number in range(whole.num_record_batches)), whole.schema
            )
        else:
            file.seek(0)
            stream = pa.ipc.open_stream(file)
            _check_columns(stream.schema, label)
            yield from _number(_checked(stream), stream.schema)
            file.seek(max(file.tell() - len(END_OF_STREAM), 0))
            if file.read(len(END_OF_STREAM)) != END_OF_STREAM:  # its writer was stopped between two batches
                raise SourceError(f"{label}: the end mark of the Arrow stream is missing: cut short; write it again")


def _check_columns(schema: Any, label: str) -> None:
    twice = names_twice(schema.names)
    if twice:
        raise SourceError(f"{label}: it names these columns twice: {', '.join(map(repr, twice[:SHOWN]))}; rename one")


def _checked(batches: Iterable[Any]) -> Iterator[Any]:
    """Batches whose offsets point inside them: Arrow trusts a file, and a damaged one could crash the process."""
    for batch in batches:
        for column in batch.columns:
            is_text = any(test(column.type) for test in TEXT)  # not UTF-8: a problem of its row, not of the file
            binary = pa.large_binary() if pa.types.is_large_string(column.type) else pa.binary()
            (column.view(binary) if is_text else column).validate(full=True)
        yield batch


def _number(batches: Iterable[Any], schema: Any) -> Iterator[RawRow]:
    before = 0
    for batch in batches:
        for start in range(0, batch.num_rows, ROWS_PER_BATCH):
            part = batch.slice(start, ROWS_PER_BATCH)
            for raw in _sized_rows(part, schema):
                yield raw._replace(row_number=before + raw.row_number)
            before += part.num_rows


def _sized_rows(part: Any, schema: Any) -> Iterator[RawRow]:
    """Rows of a part, decoded only as many as memory has place for; what is too large is not decoded."""
    sizes = row_sizes(part)
    if sizes.sum() <= BATCH_BYTES and sizes.max(initial=0) <= MOST_ROW_BYTES:
        yield from _rows(_plain(part, schema))
        return
    for at, size in enumerate(sizes.tolist()):
        row, problem = part.slice(at, 1), None
        if size > MOST_ROW_BYTES:
            small = [name for name, column in zip(row.schema.names, row.columns, strict=True) if _is_small(column)]
            row, problem = row.select(small), too_large(int(size))
        (raw,) = _rows(_plain(row, schema)) if row.num_columns else [RawRow("{}", 1)]
        yield raw._replace(row_number=at + 1, problem=problem or raw.problem)


def _is_small(column: Any) -> bool:
    return bool(sizes_of(column)[0] <= KEPT_CHARACTERS)


def _plain(part: Any, schema: Any) -> Any:
    """The part with the types that the file says, where dictionaries stand for some of them."""
    if part.schema.types == [schema.field(name).type for name in part.schema.names]:
        return part
    wanted = pa.schema([schema.field(name) for name in part.schema.names])
    return pa.Table.from_batches([part]).cast(wanted).combine_chunks().to_batches()[0]


def _rows(part: Any) -> Iterator[RawRow]:
    values = ArrowValues(part.schema)
    try:
        rows = _exact_times(part).to_pylist()
    except (ValueError, OverflowError, LookupError, pa.ArrowException):  # one value in it that Python cannot hold
        return _rows_value_by_value(part, values)
    return number_rows(rows, values)


def _exact_times(part: Any) -> Any:
    """The batch with times of day that have nanoseconds as text: Python's `time` would drop them."""
    for at, column in enumerate(part.columns):
        if column.type == pa.time64("ns"):
            cut = column.cast(pa.time64("us"), safe=False)
            if not cut.cast(pa.time64("ns")).equals(column):
                exact = zip(column.cast(pa.string()).to_pylist(), cut.to_pylist(), strict=True)
                texts = [text and (text if text[-3:] != "000" else time.isoformat()) for text, time in exact]
                part = part.set_column(at, part.schema.names[at], pa.array(texts, pa.string()))
    return part


def _rows_value_by_value(part: Any, values: ArrowValues) -> Iterator[RawRow]:
    for number in range(part.num_rows):
        row, problem = {}, None
        for name, column in zip(part.schema.names, part.columns, strict=True):
            try:
                row[name] = column[number].as_py()
            except (ValueError, OverflowError, LookupError, pa.ArrowException) as error:
                reason = "not_utf8" if isinstance(error, UnicodeDecodeError) else "not_text"
                problem = problem or f"{reason}: column {name!r} of type {column.type}: {error}"
                row[name] = _escaped(column[number])
        (raw,) = number_rows([row], values)
        yield raw._replace(row_number=number + 1, problem=problem or raw.problem)


def _escaped(value: Any) -> str | None:
    """Bytes of a text with the bad ones escaped, or the number behind a date; None for nested values."""
    for plain in (pa.binary(), pa.int64(), pa.int32()):
        try:
            held = value.cast(plain).as_py()
        except pa.ArrowException:
            continue
        return held.decode("utf-8", "backslashreplace") if isinstance(held, bytes) else str(held)
    return None
