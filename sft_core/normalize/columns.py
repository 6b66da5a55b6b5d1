"""Columns of a row, read with their types checked; a user's map_fn may use these too. And who reads which columns.

In: a row. Out: the text or messages in a column, or a RowError that says which column lacks what.
"""

import re
from typing import Any

from sft_core.errors import RowError

Row = dict[str, Any]
Returned = dict[str, Any]
"""What a map_fn returns."""
ADDRESS = re.compile(r" at 0x[0-9a-f]+")
"""In the `repr` of an object that has none of its own."""

COLUMNS: dict[str, tuple[tuple[str, ...], ...]] = {
    "messages": (("messages",),),
    "openai": (("messages",),),
    "sharegpt": (("conversations",),),
    "wizardlm": (("conversations",),),
    "msagent_react": (("conversations",),),
    "alpaca_zh": (("instruction_zh", "output_zh"),),
    "dolly": (("instruction", "context", "response"),),
    "openorca": (("system_prompt", "question", "response"),),
    "sql": (("context", "question", "answer"),),
    "arxiv": (("abstract", "title"),),
    "colors": (("description", "color"),),
    "code_alpaca": (("prompt", "completion"),),
    "tiny_codes": (("prompt", "response"),),
    "stack_exchange": (("question", "response"),),
    "gsm8k": (("question", "answer"),),
    "law_reference": (("question", "answer"),),
    "alpaca": (("instruction", "output"),),
    "medical": (("instruction", "output"),),
    "default": (("conversation",), ("input", "output")),
    "crime_kg_assitant": (("input", "output"),),
    "oasst1": (("text",),),
    "pretrain": (("text",),),
}
"""The columns that each shipped map_fn cannot do without (more than one way to fit for `default`), best fit first: ours
before XTuner's where they read the same column and keep more of it, many columns before few."""


def suggest_map_fns(row: object) -> tuple[str, ...]:
    """Names of the shipped map_fns that can read a row's columns, the best fit first.

    >>> suggest_map_fns({"prompt": "Print 1.", "response": "print(1)"})
    ('tiny_codes',)
    >>> suggest_map_fns({"query": "1 + 1", "reply": "2"})
    ()
    """
    if not isinstance(row, dict):
        return ()
    return tuple(name for name, ways in COLUMNS.items() if any(row.keys() >= set(columns) for columns in ways))


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


def answer_in(row: Row, column: str, where: str = "") -> str:
    """The text in a column, which must hold more than blanks."""
    return check_answer(text_in(row, column, where), f"{where}.{column}" if where else column)


def check_answer(answer: str, name: str) -> str:
    """The answer itself, unless there is nothing in it to learn."""
    if not answer.strip():
        raise RowError("empty_answer", f"the answer in {name} is empty")
    return answer


def messages_in(row: Row, column: str = "messages") -> list[dict[str, Any]]:
    """The list of messages in a column, of which there must be one or more."""
    if column not in row:
        raise RowError("missing_column", f"no column {column!r}; there are {_names(row)}")
    messages = row[column]
    if messages is None:
        raise RowError("null_value", f"column {column!r} is null")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise RowError("wrong_type", f"column {column!r} is not a list of messages: {short(messages)}")
    if not messages:
        raise RowError("no_turns", f"column {column!r} is empty")
    return messages


def short(value: object) -> str:
    """At most 80 characters of a value, for an error; without addresses in memory, which differ from run to run."""
    text = ADDRESS.sub("", repr(value))
    return text if len(text) <= 80 else f"{text[:77]}..."


def _names(row: Row) -> str:
    return ", ".join(sorted(map(str, row))) or "none"
