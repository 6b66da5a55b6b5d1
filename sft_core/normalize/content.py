"""What a message can hold besides a plain text: a list of text parts, tool calls, the tools there are.

In: values as data sets have them (lists, mappings, or JSON text of these). Out: one text; JSON text in OpenAI's shape,
`[{"id"?, "type": "function", "function": {"name", "arguments"}}]` with `arguments` a mapping wherever it can be read as
one (HF's chat templates expect that), and `[{"type": "function", "function": {...}}]` for tools.
"""

import json
from collections.abc import Mapping
from typing import Any

from sft_core.errors import RowError
from sft_core.normalize.columns import short, text_in
from sft_core.normalize.thoughts import is_thought


def content_in(message: dict[str, Any], where: str, key: str = "content") -> str:
    """A message's content; text parts are joined without a separator, thoughts left to `thought_in`.

    >>> content_in({"content": [{"type": "text", "text": "Hi, "}, {"type": "text", "text": "you."}]}, "messages[0]")
    'Hi, you.'
    """
    parts = message.get(key)
    if not isinstance(parts, list):
        return text_in(message, key, where)
    spoken = [(place, part) for place, part in enumerate(parts) if not is_thought(part)]
    return "".join(_part(part, f"{where}.{key}[{place}]") for place, part in spoken)


def calls_text(value: object, where: str) -> str | None:
    """JSON text of an assistant's tool calls; None where there are none.

    >>> calls_text({"name": "add", "arguments": '{"a": 1}'}, "messages[1]")
    '[{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]'
    """
    return _text([_call(call, where) for call in _mappings(value, f"{where}.tool_calls")], where)


def tools_text(value: object) -> str | None:
    """JSON text of the tools a conversation has; None where it has none.

    >>> tools_text('[{"name": "add"}]')
    '[{"type": "function", "function": {"name": "add"}}]'
    """
    return _text([_tool(tool) for tool in _mappings(value, "tools")], "tools")


def check_utf8(text: str, owner: str) -> str:
    """The text itself, unless half of a surrogate pair is in it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = f"U+{ord(text[error.start]):04X}"
        raise RowError("not_utf8", f"the {owner}'s text holds half of a character, {code}, at {error.start}") from None
    return text


def _part(part: object, where: str) -> str:
    if not isinstance(part, dict):
        raise RowError("wrong_type", f"{where} is a {type(part).__name__}, not a typed part: {short(part)}")
    if part.get("type") != "text":
        raise RowError("content_part", f"{where} has the type {part.get('type')!r}; only parts of type text are read")
    return text_in(part, "value" if "value" in part and "text" not in part else "text", where)


def _mappings(value: object, where: str) -> list[dict[str, Any]]:
    """A list of mappings, or the one there is; either may be JSON text."""
    if isinstance(value, str):
        value = _parsed(value, where) if value.strip() else None
    if not value:
        return []
    entries = [value] if isinstance(value, dict) else value
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise RowError("tool_calls", f"{where} is not a list of mappings: {short(value)}")
    return entries


def _call(call: dict[str, Any], where: str) -> dict[str, Any]:
    function = call.get("function") or call
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not name:
        raise RowError("tool_calls", f"{where}: a tool call without the name of a function: {short(call)}")
    found = {"type": "function", "function": {"name": name, "arguments": _arguments(function.get("arguments"), where)}}
    return {"id": call["id"], **found} if isinstance(call.get("id"), str) else found


def _arguments(value: object, where: str) -> object:
    """A mapping, or the text itself where it is the JSON of none."""
    if value is None or value == "":
        return {}
    if isinstance(value, str):
        try:
            parsed = json.loads(value)
        except (ValueError, RecursionError):
            return value
        return parsed if isinstance(parsed, dict) else value
    if not isinstance(value, Mapping):
        raise RowError("tool_calls", f"{where}: arguments are a {type(value).__name__}: {short(value)}")
    return value


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    if isinstance(tool.get("function"), dict):
        return tool
    if not isinstance(tool.get("name"), str):
        raise RowError("tool_calls", f"a tool without a name: {short(tool)}")
    return {"type": "function", "function": tool}


def _parsed(text: str, where: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RowError("tool_calls", f"{where} is a text that is not JSON: {error}: {short(text)}") from None


def _text(entries: list[dict[str, Any]], where: str) -> str | None:
    """JSON text, keys in their order: a model learns to write them so."""
    if not entries:
        return None
    try:
        text = json.dumps(entries, ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise RowError("tool_calls", f"{where}: {error}") from None
    return check_utf8(text, where)
