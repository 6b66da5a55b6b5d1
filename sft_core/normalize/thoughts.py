"""The thought of an assistant's message: what a reasoning model writes before it answers or calls a tool.

In: a message, or a turn of XTuner's. Out: its thought as one text, None where there is none (missing, null, blank). It
stands under `reasoning_content` (HF's and OpenAI's name), `reasoning` or `thinking`, or in parts of the content that
have the type `thinking` or `reasoning`. `<think>` inside a content is left there. RowError for a thought that would be
lost: `two_thoughts` for two that differ, `bad_thought` for one that cannot be read or is not the assistant's.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from sft_core.errors import RowError
from sft_core.normalize.columns import short

NAMES = ("reasoning_content", "reasoning", "thinking")
PART_TYPES = ("thinking", "reasoning")
PART_KEYS = ("thinking", "reasoning", "text", "content", "value")
"""Where a part of these types has its text."""
PART_IDLE = ("type", "id", "index", "status", "closed")
"""Keys of such a part that hold nothing of the thought."""
STRUCTURED = ("reasoning_details", "thinking_blocks")
"""Lists of objects that OpenRouter and LiteLLM give beside the plain text; without it, the thought is in them alone."""
OTHER_NAMES = ("thought", "thoughts", "think", "thinking_content", "reasoning_text", "cot", "chain_of_thought")
NOT_READ = ("refusal", "audio", "image", "images", "video", "videos")
"""Keys with something that was said or shown, and that no step has a place for."""
PUT_IT = "a map_fn of your own can put the text under reasoning_content"


def thought_in(message: Mapping[str, Any], where: str, key: str = "content", *, by_assistant: bool) -> str | None:
    """The thought in a message whose content is under `key`. Looks for all else, too, that would be lost with it.

    >>> parts = [{"type": "thinking", "thinking": "One"}, {"type": "text", "text": "2"}]
    >>> thought_in({"content": parts}, "messages[1]", by_assistant=True)
    'One'
    """
    _refuse_unread(message, where)
    found = {name: _text(message.get(name), f"{where}.{name}") for name in NAMES}
    found[f"the parts of {key}"] = _in_parts(message.get(key), f"{where}.{key}")
    found = {name: text for name, text in found.items() if text}
    if found and not by_assistant:
        raise RowError(
            "bad_thought",
            f"{where} has a thought ({next(iter(found))}), and is not the assistant's message; a map_fn of your own "
            "can leave it out, or put it on the answer that it belongs to",
        )
    thought = _only(found, where)
    for name in STRUCTURED:
        if _holds(message, name) and thought is None:
            raise RowError("bad_thought", f"{where}.{name} is not read, and no plain text stands beside it; {PUT_IT}")
    for name in OTHER_NAMES:
        if _holds(message, name) and message[name] != thought:
            raise RowError("bad_thought", f"{where}.{name} is a thought under a name that is not read; {PUT_IT}")
    return thought


def is_thought(part: object) -> bool:
    """Whether a part of a content is a thought."""
    return isinstance(part, dict) and part.get("type") in PART_TYPES


def _refuse_unread(message: Mapping[str, Any], where: str) -> None:
    for name in NOT_READ:
        if _holds(message, name):
            raise RowError("content_part", f"{where} holds {name}, which is not read: {short(message[name])}")
    if message.get("channel") == "analysis":  # gpt-oss's harmony format
        raise RowError(
            "bad_thought",
            f"{where} is of the channel analysis: a thought, as a message of its own; a map_fn of your own can put its "
            "text under reasoning_content of the answer behind it",
        )


def _holds(message: Mapping[str, Any], name: str) -> bool:
    value = message.get(name)
    return bool(value.strip() if isinstance(value, str) else value)


def _in_parts(parts: object, where: str) -> str:
    """All thoughts among the parts of a content, one a line."""
    if not isinstance(parts, list):
        return ""
    thoughts = []
    for place, part in enumerate(parts):
        if is_thought(part):
            thoughts.append(_in_part(part, f"{where}[{place}]"))
        elif isinstance(part, dict) and any(part.get(name) for name in NAMES):
            raise RowError("bad_thought", f"{where}[{place}] has a thought, and the type {part.get('type')!r}")
    return "\n".join(thought for thought in thoughts if thought)


def _in_part(part: Mapping[str, Any], where: str) -> str:
    texts = {key: _text(_joined(part.get(key)), f"{where}.{key}") for key in PART_KEYS}
    thought = _only({key: text for key, text in texts.items() if text}, where)
    lost = [key for key, value in part.items() if value and key not in PART_IDLE + PART_KEYS]
    if thought is None and lost:
        raise RowError(
            "bad_thought", f"{where} has no text, but {', '.join(map(str, lost))}, which is not read; {PUT_IT}"
        )
    return thought or ""


def _joined(value: object) -> object:
    """The text of a list of text parts (Mistral's and OpenAI's thoughts); anything else as it is."""
    if not isinstance(value, list) or not all(isinstance(part, dict) for part in value):
        return value
    texts = [part.get("text") for part in value if part.get("type") in ("text", "reasoning_text")]
    readable = [text for text in texts if isinstance(text, str)]
    return "".join(readable) if len(readable) == len(value) else value


def _text(value: object, where: str) -> str:
    """A thought, empty where there is nothing in it."""
    if not value:
        return ""
    if not isinstance(value, str):
        raise RowError("bad_thought", f"{where} is a {type(value).__name__}, not a text: {short(value)}; {PUT_IT}")
    return value if value.strip() else ""


def _only(found: Mapping[str, str], where: str) -> str | None:
    """The one text that is there, under however many names."""
    for (first, thought), (second, other) in pairwise(found.items()):
        if other != thought:
            raise RowError(
                "two_thoughts",
                f"{where} has two thoughts that differ, {first} {short(thought)} and {second} {short(other)}; a map_fn "
                "of your own can choose or join them",
            )
    return next(iter(found.values()), None)
