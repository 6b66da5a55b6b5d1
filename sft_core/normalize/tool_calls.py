"""An assistant's tool calls, the tools there are, and whether the two and the tools' results fit together.

In: values as data sets have them (lists, mappings, or JSON text of these). Out: JSON text in OpenAI's shape,
`[{"id"?, "type": "function", "function": {"name", "arguments"}}]` with `arguments` a mapping (HF's chat templates
expect that), and `[{"type": "function", "function": {...}}]` for tools. RowError `tool_calls` for what cannot be read,
`bad_arguments`, `undeclared_tool` or `result_without_call` for calls and results that nobody could serve.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sft_core.errors import RowError
from sft_core.normalize.columns import rows_of, short
from sft_core.normalize.content import CALL_PART, check_utf8

CALLS_AS_TEXT = (
    "<tool_call>",
    "<function_call>",
    "<functioncall>",
    "<function=",
    "[TOOL_CALLS]",
    "<|tool_call",
    "<|python_tag|>",
    "<|plugin|>",
)
"""How a call begins that stands in an answer's text, as in Hermes' data; its name and arguments are not looked at."""
OTHER_ARGUMENTS = ("parameters", "params", "args", "kwargs", "input")


def holds_calls(message: Mapping[str, Any], key: str = "content") -> bool:
    """Whether a message calls a tool, under a key of its own or in a part of its content."""
    parts = message.get(key)
    inner = isinstance(parts, list) and any(isinstance(part, dict) and part.get("type") == CALL_PART for part in parts)
    return bool(inner or message.get("tool_calls") or message.get("function_call"))


def calls_in(message: Mapping[str, Any], where: str, key: str = "content") -> list[dict[str, Any]]:
    """A message's calls: `tool_calls`, the older `function_call`, or LLaMA-Factory's content parts `tool_call`.

    >>> calls_in({"content": [{"type": "tool_call", "value": '{"name": "add", "arguments": {}}'}]}, "messages[1]")
    [{'name': 'add', 'arguments': {}}]
    """
    parts = message.get(key) if isinstance(message.get(key), list) else []
    own = message.get("tool_calls") or message.get("function_call")
    found = []
    for place, part in enumerate(parts or []):
        if isinstance(part, dict) and part.get("type") == CALL_PART:
            at = f"{where}.{key}[{place}]"
            found += _mappings(part.get("value"), at) or _nothing(at, part)
    calls = _mappings(own, f"{where}.tool_calls")
    if calls and found:
        raise RowError("tool_calls", f"{where} calls tools in its {key} and under a key of its own")
    return calls or found


def calls_text(calls: Sequence[dict[str, Any]], where: str) -> str | None:
    """JSON text of an assistant's tool calls; None where there are none.

    >>> calls_text([{"name": "add", "arguments": '{"a": 1}'}], "messages[1]")
    '[{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]'
    """
    return _text([_call(call, where) for call in calls], where)


def tools_text(value: object) -> str | None:
    """JSON text of the tools a conversation has; None where it has none.

    >>> tools_text('[{"name": "add"}]')
    '[{"type": "function", "function": {"name": "add"}}]'
    """
    return _text([_tool(tool) for tool in _mappings(value, "tools")], "tools")


def check_calls(messages: Sequence[Mapping[str, Any]], tools: str | None) -> None:
    """RowError where a call names a tool that the row does not declare, or a tool's result answers no call."""
    if not any(message["role"] == "tool" or message.get("tool_calls") for message in messages):
        return
    names = {tool["function"].get("name") for tool in json.loads(tools)} if tools else set()
    waiting, before, ids, nameless = 0.0, "", set[str](), False
    for place, message in enumerate(messages):
        role, where = message["role"], f"messages[{place}]"
        if role == "assistant":
            calls = json.loads(message.get("tool_calls") or "[]")
            for call in calls:
                if names and call["function"]["name"] not in names:
                    raise RowError(
                        "undeclared_tool",
                        f"{where} calls {short(call['function']['name'])}; the row declares {_listed(names)}",
                    )
            nameless |= any("id" not in call for call in calls)
            ids |= {call["id"] for call in calls if "id" in call}
            waiting = (waiting if before == "assistant" else 0) + len(calls)
            if not calls and any(mark in message["content"] for mark in CALLS_AS_TEXT):
                waiting, nameless = float("inf"), True
        elif role == "tool":
            answered = message.get("tool_call_id")
            if waiting < 1:
                raise RowError("result_without_call", f"{where} is a tool's, and no call before it waits for a result")
            if answered and not nameless and answered not in ids:
                raise RowError("result_without_call", f"{where} answers the call {short(answered)}, which nobody made")
            waiting -= 1
        before = role


def _listed(names: set[Any]) -> str:
    return short(", ".join(sorted(map(str, names))))


def _nothing(where: str, part: object) -> list[dict[str, Any]]:
    raise RowError("tool_calls", f"{where} holds no call under value: {short(part)}")


def _mappings(value: object, where: str) -> list[dict[str, Any]]:
    """A list of mappings, or the one there is; each may be JSON text, a list also a struct of lists."""
    if isinstance(value, str):
        value = _parsed(value, where) if value.strip() else None
    if not value:
        return []
    entries = (rows_of(value) or [value]) if isinstance(value, dict) else value
    if isinstance(entries, list) and any(isinstance(entry, str) for entry in entries):
        entries = [_parsed(entry, where) if isinstance(entry, str) else entry for entry in entries]
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise RowError("tool_calls", f"{where} is not a list of mappings: {short(value)}")
    return entries


def _call(call: dict[str, Any], where: str) -> dict[str, Any]:
    function = call.get("function") or call
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not name:
        raise RowError("tool_calls", f"{where}: a tool call without the name of a function: {short(call)}")
    found = {"type": "function", "function": {"name": name, "arguments": _arguments(function, where)}}
    return {"id": call["id"], **found} if isinstance(call.get("id"), str) else found


def _arguments(function: dict[str, Any], where: str) -> Mapping[str, Any]:
    """The mapping, which may be JSON text; no arguments at all are an empty one."""
    value = function.get("arguments")
    if value is None or value == "":
        if other := next((key for key in OTHER_ARGUMENTS if function.get(key)), None):
            raise RowError("bad_arguments", f"{where}: the call has {other}, which is not read; name it arguments")
        return {}
    parsed = value
    if isinstance(value, str):
        try:
            parsed = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise RowError("bad_arguments", f"{where}: arguments are not JSON: {error}: {short(value)}") from None
    if not isinstance(parsed, Mapping):
        raise RowError("bad_arguments", f"{where}: arguments are no JSON object: {short(value)}")
    return parsed


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
