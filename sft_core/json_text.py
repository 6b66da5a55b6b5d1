"""Texts that may be JSON, from anywhere.

In: a text or bytes. Out: the value. Everything that is wrong with it is one ValueError: Python's own reader raises
RecursionError too, and refuses whole numbers of more than 4300 digits.
"""

import json
from typing import Any

from sft_core.bounds import MOST_DEPTH, nests_too_deeply

TOO_DEEP = f"lists and objects nested more than {MOST_DEPTH} deep"


def parse_json(text: str | bytes) -> Any:
    """The value. JSONDecodeError where it is not JSON, ValueError for what nests more than MOST_DEPTH deep.

    >>> parse_json('[' * 101 + ']' * 101)
    Traceback (most recent call last):
    ValueError: lists and objects nested more than 100 deep
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    if isinstance(value, dict | list) and may_nest(text) and nests_too_deeply(value):
        raise ValueError(TOO_DEEP)
    return value


def may_nest(text: str | bytes) -> bool:
    """Whether there are brackets enough: counting them costs a hundredth of reading the text."""
    if isinstance(text, str):
        return text.count("{") + text.count("[") > MOST_DEPTH
    return text.count(b"{") + text.count(b"[") > MOST_DEPTH


def value_or_text(text: str) -> Any:
    """What a text says as JSON; the text itself where it is none.

    >>> value_or_text('{"a": 1}'), value_or_text("a: 1")
    ({'a': 1}, 'a: 1')
    """
    try:
        return parse_json(text)
    except ValueError:
        return text
