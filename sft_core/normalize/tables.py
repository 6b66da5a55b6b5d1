"""Conversations as Arrow tables: their schemas, and how they are made and measured.

In: conversations. Out: tables of LOCAL_SCHEMA (in a shard: `file` is an index into the names of the shard's place,
`row_number` counts from its `first_row`) and of CONVERSATION_SCHEMA (located).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sft_core.normalize.conversation import Message

MESSAGE = pa.struct(
    [
        ("role", pa.string()),
        ("content", pa.string()),
        ("weight", pa.int8()),
        ("tool_calls", pa.string()),  # JSON text, here and in `tools`
        ("name", pa.string()),
        ("tool_call_id", pa.string()),
        ("reasoning_content", pa.string()),  # an assistant's thought
    ]
)
CONTENT = [("row_id", pa.string()), ("messages", pa.list_(MESSAGE)), ("tools", pa.string())]
LOCAL_SCHEMA = pa.schema([*CONTENT, ("file", pa.int32()), ("row_number", pa.int64())])
CONVERSATION_SCHEMA = pa.schema([*CONTENT, ("dataset", pa.string()), ("file", pa.string()), ("row_number", pa.int64())])
Counts = NDArray[np.int64]


def messages_column(conversations: Sequence[list[Message]]) -> pa.ListArray:
    """The column `messages`."""
    messages = [message for conversation in conversations for message in conversation]
    fields = [pa.array([message.get(field.name) for message in messages], field.type) for field in MESSAGE]
    offsets = np.cumsum([0, *map(len, conversations)], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.StructArray.from_arrays(fields, fields=list(MESSAGE)))


def sizes(table: pa.Table) -> tuple[Counts, Counts]:
    """Answers and characters (contents and thoughts) of each conversation, (rows,) both."""
    column = table.column("messages").combine_chunks()
    parents = np.asarray(pc.list_parent_indices(column))
    flat = pc.list_flatten(column)
    answers = np.asarray(pc.is_valid(pc.struct_field(flat, "weight")))
    characters = _lengths(flat, "content") + _lengths(flat, "reasoning_content")
    return _sums(parents, answers, len(table)), _sums(parents, characters, len(table))


def _lengths(messages: pa.StructArray, key: str) -> Counts:
    """Characters of a field, (messages,); 0 where it is null."""
    return np.asarray(pc.fill_null(pc.utf8_length(pc.struct_field(messages, key)), 0))


def _sums(owners: Counts, values: NDArray[Any], count: int) -> Counts:
    return np.bincount(owners, values, count).astype(np.int64)


def located(table: pa.Table, place: Mapping[str, Any]) -> pa.Table:
    """A table of LOCAL_SCHEMA with its origin, CONVERSATION_SCHEMA."""
    origin = {
        "dataset": pa.repeat(pa.scalar(place["dataset"], pa.string()), len(table)),
        "file": pa.array(place["files"], pa.string()).take(table.column("file").combine_chunks()),
        "row_number": pc.add(table.column("row_number"), place["first_row"]),
    }
    content = {name: table.column(name) for name, _ in CONTENT}
    return pa.table(content | origin, schema=CONVERSATION_SCHEMA)


def parquet_bytes(table: pa.Table) -> bytes:
    """The table as a Parquet file; the bytes depend on it and pyarrow's version only."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def read_parquet(path: Path, columns: list[str] | None = None) -> pa.Table:
    """One file; names of its folders never become columns, as they may with `pq.read_table`."""
    with pq.ParquetFile(path) as file:
        return file.read(columns)
