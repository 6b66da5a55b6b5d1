"""Proof that a row's own texts stand in its rendering: templates leave out what they were not written for.

In: a rendering, its messages as the template got them, its trained spans. Out: nothing, or a RowError: `lost_text`,
`lost_thought`, `tool_calls`, `tools`, with the text that is missing. A text counts as there if it stands as it is but
for white space at its ends, or escaped as JSON. What a trained turn says must stand inside its span.

Thoughts of earlier turns may be left out: thinking models' templates do that, at the server as here. Ids of calls and
names of speakers are not looked for.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from sft_core.errors import RowError
from sft_core.pack.thoughts import without_thought

SHOWN_CHARACTERS = 60
Message = Mapping[str, Any]
Bounds = tuple[int, int]


def prove_texts(text: str, chat: Sequence[Message], spans: Mapping[int, Bounds]) -> None:
    """Every message of `chat` up to the last trained one stands in `text`, in order. `spans`: of turns trained here."""
    if not spans:
        return
    cursor, systems = 0, set[int]()
    for place in range(max(spans) + 1):
        message = chat[place]
        if place in spans:
            cursor = end_of_turn_texts(text, spans[place], message, place)
            continue
        limit = min(start for turn, (start, _) in spans.items() if turn > place)
        if message["role"] == "system":
            cursor = _find_system(text, (cursor, limit), message, place, systems)
        else:
            cursor = _find_message(text, (cursor, limit), message, place)


def end_of_turn_texts(text: str, bounds: Bounds, message: Message, place: int) -> int:
    """Where the last text of an assistant's message ends within `bounds`. Thought, content and calls must be there."""
    start, end = bounds
    cursor = start
    if thought := message.get("reasoning_content"):
        found = _find(text, thought, start, end)
        if found is None:
            raise RowError("lost_thought", f"message {place}: its thought is not in what is trained: {_short(thought)}")
        cursor = found
    return _find_message(text, (cursor, end), message, place, own=True)


def prove_tools(text: str, tools: Iterable[Mapping[str, Any]]) -> None:
    """Names, descriptions and parameters of the tools stand in the rendering."""
    for tool in tools:
        for word in _words_of_tool(tool):
            if _find(text, word, 0, len(text)) is None:
                raise RowError(
                    "tools", f"the chat template does not render the tools, or leaves this out: {_short(word)}"
                )


def _find_message(text: str, bounds: Bounds, message: Message, place: int, own: bool = False) -> int:
    """End of the message's texts. `own`: it is the turn itself, whose thoughts count too."""
    cursor, end = bounds
    content = text_of_content(message)
    found = _find(text, content, cursor, end)
    if found is not None and _is_printed_list(text, bounds, message):
        found = None
    if found is None and (parts := without_thought(content)) is not None and message["role"] == "assistant":
        thought, rest = parts
        if own and thought.strip():
            inside = _find(text, thought, cursor, end)
            if inside is None:
                raise RowError(
                    "lost_thought", f"message {place}: the chat template cuts its thought out: {_short(thought)}"
                )
            cursor = inside
        found = _find(text, rest, cursor, end)
    if found is None:
        raise RowError(
            "lost_text",
            f"message {place} ({message['role']}): the chat template leaves its text out: {_short(content)}",
        )
    for call in message.get("tool_calls") or ():
        found = _find_call(text, (found, end), call, place)
    return found


def _is_printed_list(text: str, bounds: Bounds, message: Message) -> bool:
    """Whether the template writes a list of content parts as Python does."""
    parts = message.get("content")
    return isinstance(parts, list) and any(text.find(repr(part), *bounds) >= 0 for part in parts)


def _find_system(text: str, bounds: Bounds, message: Message, place: int, taken: set[int]) -> int:
    """Some templates write system texts elsewhere: any place that is no other system message's. The new cursor."""
    cursor, limit = bounds
    content = text_of_content(message)
    found = _find(text, content, cursor, limit)
    if found is not None and found not in taken:
        taken.add(found)
        return found
    at = _find(text, content, 0, limit)
    while at is not None and at in taken:
        at = _find(text, content, at, limit)
    if at is None:
        raise RowError(
            "lost_text", f"message {place} (system): the chat template leaves its text out: {_short(content)}"
        )
    taken.add(at)
    return cursor


def _find_call(text: str, bounds: Bounds, call: Any, place: int) -> int:
    """End of a tool call's texts: its name, the keys and values of its arguments, in whatever order."""
    start, end = bounds
    function = call.get("function") or call
    arguments = function.get("arguments")
    latest = start
    for word in (function["name"], *_leaves(arguments)):
        found = _find(text, word, start, end)
        if found is None:
            raise RowError(
                "tool_calls",
                f"message {place}: the chat template does not render its tool call: {_short(word)} is lost",
            )
        latest = max(latest, found)
    if isinstance(arguments, Mapping) and arguments and text.find(repr(arguments), start, end) >= 0:
        raise RowError(
            "tool_calls", f"message {place}: the chat template writes its arguments as Python does, not JSON"
        )
    return latest


def text_of_content(message: Message) -> str:
    """Content as one text, whatever form the template wants."""
    content = message.get("content")
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content)
    return content or ""


def _find(text: str, wanted: object, start: int, end: int) -> int | None:
    """Where the first spelling of `wanted` that is found ends, looked for from `start` to `end`."""
    for spelling in _spellings(wanted):
        at = text.find(spelling, start, end)
        if at >= 0:
            return at + len(spelling)
    return None


def _spellings(wanted: object) -> Iterator[str]:
    if not isinstance(wanted, str):
        yield json.dumps(wanted)
        yield str(wanted)
        return
    plain = wanted.strip()
    yield plain
    escaped = json.dumps(plain, ensure_ascii=False)[1:-1]
    if escaped != plain:
        yield escaped
        yield json.dumps(escaped, ensure_ascii=False)[1:-1]
    if not plain.isascii():
        yield json.dumps(plain)[1:-1]


def _leaves(value: object) -> Iterator[object]:
    """Keys and values of a call's arguments."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield key
            yield from _leaves(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _leaves(part)
    else:
        yield value


def _words_of_tool(tool: Mapping[str, Any]) -> Iterator[str]:
    """What a tool's schema says: names, descriptions, names of properties, at any depth."""
    function = tool.get("function")
    described = function if isinstance(function, Mapping) else tool
    if isinstance(described.get("name"), str):
        yield described["name"]
    yield from _words_of_schema(described)


def _words_of_schema(schema: object) -> Iterator[str]:
    if isinstance(schema, list | tuple):
        for part in schema:
            yield from _words_of_schema(part)
    if not isinstance(schema, Mapping):
        return
    if isinstance(schema.get("description"), str):
        yield schema["description"]
    properties = schema.get("properties")
    if isinstance(properties, Mapping):
        yield from (key for key in properties if isinstance(key, str))
        for part in properties.values():
            yield from _words_of_schema(part)
    for key in ("parameters", "items", "anyOf", "oneOf", "allOf"):
        yield from _words_of_schema(schema.get(key))


def _short(text: object) -> str:
    shown = str(text).strip()
    return repr(shown if len(shown) <= SHOWN_CHARACTERS else f"{shown[:SHOWN_CHARACTERS]}...")
