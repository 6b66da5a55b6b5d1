"""Thoughts of an assistant's message: in `reasoning_content`, or at its content's start inside `<think>...</think>`.

In: messages. Out: their parts, or messages without thoughts (`pack.reasoning: drop`).
"""

import re
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from typing import Any

from sft_core.errors import RowError

INLINE = re.compile(r"\s*(?:<think>)?(?P<thought>.*)</think>(?P<rest>.*)", re.DOTALL)
"""A content that thinks first; some data lack the opening tag, which their models' prompts end with."""
EMPTY = re.compile(r"\s*<think>\s*</think>")
"""What some templates write before an answer that has no thought."""


def without_thought(content: str) -> tuple[str, str] | None:
    """Thought and rest of a content that thinks first; None for others.

    >>> without_thought("<think>hm</think>Yes.")
    ('hm', 'Yes.')
    """
    match = INLINE.fullmatch(content) if "</think>" in content else None
    return (match["thought"], match["rest"]) if match else None


def thinks_inline(message: Mapping[str, Any]) -> bool:
    """Whether an assistant's message has its thought in its content only."""
    content = message.get("content")
    return (
        message["role"] == "assistant"
        and not message.get("reasoning_content")
        and isinstance(content, str)
        and without_thought(content) is not None
    )


def drop_thoughts(messages: SequenceOf[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], int]:
    """The messages without thoughts, and how many there were. RowError where nothing else was said."""
    kept, dropped = [], 0
    for place, message in enumerate(messages):
        plain = {key: value for key, value in message.items() if key != "reasoning_content"}
        had = bool(message.get("reasoning_content"))
        if thinks_inline(message):
            _, rest = without_thought(message["content"]) or ("", "")
            plain["content"], had = rest.lstrip(), True
        if had and not plain.get("content") and not plain.get("tool_calls"):
            raise RowError("only_a_thought", f"message {place}: without its thought (pack.reasoning: drop) it is empty")
        kept.append(plain)
        dropped += had
    return kept, dropped
