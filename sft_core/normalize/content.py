"""A message's content as one text.

In: a message whose content is a text or a list of parts. Out: the text; thoughts among the parts are left to
`thoughts`, calls to `tool_calls`. RowError for a part that nobody reads.
"""

from typing import Any

from sft_core.errors import RowError
from sft_core.normalize.columns import short, text_in
from sft_core.normalize.thoughts import is_thought

CALL_PART = "tool_call"
"""The type of a part that is a call: LLaMA-Factory's, JSON text under `value`."""


def content_in(message: dict[str, Any], where: str, key: str = "content") -> str:
    """A message's content; text parts are joined without a separator, thoughts and calls left out.

    >>> content_in({"content": [{"type": "text", "text": "Hi, "}, {"type": "text", "text": "you."}]}, "messages[0]")
    'Hi, you.'
    """
    parts = message.get(key)
    if not isinstance(parts, list):
        return text_in(message, key, where)
    spoken = [(place, part) for place, part in enumerate(parts) if not (is_thought(part) or _is_call(part))]
    return "".join(_part(part, f"{where}.{key}[{place}]") for place, part in spoken)


def check_utf8(text: str, owner: str) -> str:
    """The text itself, unless half of a surrogate pair is in it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = f"U+{ord(text[error.start]):04X}"
        raise RowError("not_utf8", f"the {owner}'s text holds half of a character, {code}, at {error.start}") from None
    return text


def _is_call(part: object) -> bool:
    return isinstance(part, dict) and part.get("type") == CALL_PART


def _part(part: object, where: str) -> str:
    if not isinstance(part, dict):
        raise RowError("wrong_type", f"{where} is a {type(part).__name__}, not a typed part: {short(part)}")
    if part.get("type") != "text":
        raise RowError("content_part", f"{where} has the type {part.get('type')!r}; only parts of type text are read")
    return text_in(part, "value" if "value" in part and "text" not in part else "text", where)
