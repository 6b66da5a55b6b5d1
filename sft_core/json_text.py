"""Texts that may be JSON."""

import json
from typing import Any


def value_or_text(text: str) -> Any:
    """What a text says as JSON; the text itself where it is none.

    >>> value_or_text('{"a": 1}'), value_or_text("a: 1")
    ({'a': 1}, 'a: 1')
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
