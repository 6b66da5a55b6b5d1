"""Columns of a row, read with their types checked; a user's map_fn may use these too.

In: a row. Out: the text or messages in a column, or a RowError that says which column lacks what.
"""

import json
import re
from typing import Any

from sft_core.blank import is_blank
from sft_core.errors import RowError

Row = dict[str, Any]
Returned = dict[str, Any]
"""What a map_fn returns."""
ADDRESS = re.compile(r" at 0x[0-9a-f]+")
"""In the `repr` of an object that has none of its own."""


def text_in(row: Row, column: str, where: str = "") -> str:
    """The text in a column, which must be there. `where` names a part of the row, such as `messages[2]`."""
    name = f"{where}.{column}" if where else f"column {column!r}"
    if column not in row:
        raise RowError("missing_column", f"no {name}; there are {_names(row)}")
    value = row[column]
    if value is None:
        raise RowError("null_value", f"{name} is null")
    if not isinstance(value, str):
        raise RowError("wrong_type", f"{name} is a {type(value).__name__}, not a text: {short(value)}")
    return value


def optional_in(row: Row, column: str) -> str:
    """The text in a column, empty where it is missing or null."""
    return "" if row.get(column) is None else text_in(row, column)


def system_in(row: Row) -> str:
    """The system prompt beside a row's other columns, under `system` or `system_prompt`; empty where there is none."""
    found = {name: text_in(row, name) for name in ("system", "system_prompt") if row.get(name)}
    texts = {text.strip(): text for text in found.values() if text.strip()}
    if len(texts) > 1:
        raise RowError("unread_column", "the columns system and system_prompt differ, and a row has one system prompt")
    return next(iter(texts.values()), "")


def answer_in(row: Row, column: str, where: str = "") -> str:
    """The text in a column, which must hold more than blanks."""
    return check_answer(text_in(row, column, where), f"{where}.{column}" if where else column)


def check_answer(answer: str, name: str) -> str:
    """The answer itself, unless there is nothing in it to learn."""
    if is_blank(answer):
        raise RowError("empty_answer", f"the answer in {name} is empty")
    return answer


def rows_of(struct: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The list of mappings that a struct of lists stands for (what `datasets` makes of a Sequence of mappings).

    >>> rows_of({"role": ["user", "assistant"], "content": ["A", "B"]})
    [{'role': 'user', 'content': 'A'}, {'role': 'assistant', 'content': 'B'}]
    """
    columns = {key: rows_of(value) if isinstance(value, dict) else value for key, value in struct.items()}
    held = {key: values for key, values in columns.items() if struct[key] is not None}
    sizes = {len(values) if isinstance(values, list) else -1 for values in held.values()}
    if len(sizes) != 1 or -1 in sizes:
        return None
    return [dict(zip(held, values, strict=True)) for values in zip(*held.values(), strict=True)]


def holds_messages(value: object) -> bool:
    """Whether a column of several shapes holds messages: a list of them, or JSON text of one."""
    value = _unpacked(value)
    return isinstance(value, list) and bool(value) and all(isinstance(m, dict) and "role" in m for m in value)


def messages_in(row: Row, column: str = "messages") -> list[dict[str, Any]]:
    """The list of messages in a column, of which there must be one or more; JSON text of it, and a struct of lists, are
    read too.

    >>> messages_in({"messages": '[{"role": "user", "content": "A"}]'})
    [{'role': 'user', 'content': 'A'}]
    """
    if column not in row:
        raise RowError("missing_column", f"no column {column!r}; there are {_names(row)}")
    messages = _unpacked(row[column])
    if messages is None:
        raise RowError("null_value", f"column {column!r} is null")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise RowError("wrong_type", f"column {column!r} is not a list of messages: {short(messages)}")
    if not messages:
        raise RowError("no_turns", f"column {column!r} is empty")
    return messages


def _unpacked(value: object) -> object:
    """JSON text and structs of lists as the lists that they stand for; anything else as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return value
    if isinstance(value, dict):
        rows = rows_of(value)
        return value if rows is None else rows
    if isinstance(value, list) and any(isinstance(entry, str) for entry in value):
        return [_unpacked(entry) for entry in value]  # each message JSON text of its own
    return value


def short(value: object) -> str:
    """At most 80 characters of a value, for an error; without addresses in memory, which differ from run to run."""
    text = ADDRESS.sub("", repr(value))
    return text if len(text) <= 80 else f"{text[:77]}..."


def _names(row: Row) -> str:
    return ", ".join(sorted(map(str, row))) or "none"
