"""Columns of a row, read with their types checked; a user's map_fn may use these too.

In: a row. Out: the text or messages in a column, or a RowError that says which column lacks what.
"""

from typing import Any

from sft_core.errors import RowError

Row = dict[str, Any]


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


def answer_in(row: Row, column: str, where: str = "") -> str:
    """The text in a column, which must hold more than blanks."""
    return check_answer(text_in(row, column, where), f"{where}.{column}" if where else column)


def check_answer(answer: str, name: str) -> str:
    """The answer itself, unless there is nothing in it to learn."""
    if not answer.strip():
        raise RowError("empty_answer", f"the answer in {name} is empty")
    return answer


def messages_in(row: Row) -> list[dict[str, Any]]:
    """The list in column messages, of which there must be one or more."""
    if "messages" not in row:
        raise RowError("missing_column", f"no column 'messages'; there are {_names(row)}")
    messages = row["messages"]
    if messages is None:
        raise RowError("null_value", "column 'messages' is null")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise RowError("wrong_type", f"column 'messages' is not a list of messages: {short(messages)}")
    if not messages:
        raise RowError("no_turns", "column 'messages' is empty")
    return messages


def short(value: object) -> str:
    """At most 80 characters of a value, for an error."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _names(row: Row) -> str:
    return ", ".join(sorted(map(str, row))) or "none"
