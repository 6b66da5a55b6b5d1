"""What a map_fn returns, turned into messages: the shape that the store holds and every later step reads.

In: {"conversation": [{"system"?, "input"?, "output", "reasoning_content"?, "output_with_loss"?}, ...]},
{"messages": [...], "tools"?} or {"text": ...}. Out: [{"role", "content", "weight"}, ...]; weight is 1 (trained) or 0 on
assistant messages, null on all others. Where there are such: `tool_calls` (JSON text, on assistant messages, whose
content may then be empty), `tool_call_id`, `name`, `reasoning_content` (an assistant's thought, see `thoughts`); and
beside the messages `tools` (JSON text). Roles: system (developer), user, assistant, tool (function). Plain text is one
message of the role `text`, weight 1. RowError for anything else.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict

from sft_core.errors import RowError
from sft_core.fingerprint import canonical_json
from sft_core.normalize.columns import answer_in, check_answer, messages_in, short
from sft_core.normalize.content import check_utf8, content_in
from sft_core.normalize.marks import check_row, trained
from sft_core.normalize.thoughts import thought_in
from sft_core.normalize.tool_calls import calls_in, calls_text, check_calls, tools_text

TEXT_ROLE = "text"
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
KEYS = ("conversation", "messages", "text", "tools")
SHAPES = "a map_fn returns {'conversation': [...]}, {'messages': [...]} or {'text': '...'}"


class Message(TypedDict):
    """One message. `weight` is null for all but answers and plain text; other keys stand where they are used."""

    role: str
    content: str
    weight: int | None
    tool_calls: NotRequired[str | None]
    name: NotRequired[str | None]
    tool_call_id: NotRequired[str | None]
    reasoning_content: NotRequired[str | None]


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages, and the JSON text of the tools they may call."""

    messages: list[Message]
    tools: str | None = None


def to_conversation(returned: object) -> Conversation:
    """Messages and tools of what a map_fn returned."""
    messages = to_messages(returned)
    assert isinstance(returned, dict), "to_messages refuses all else"
    check_row({key: value for key, value in returned.items() if key not in KEYS})
    tools = tools_text(returned.get("tools"))
    if tools and messages[0]["role"] == TEXT_ROLE:
        raise RowError("bad_conversation", "plain text has no place for tools; return messages")
    check_calls(messages, tools)
    return Conversation(messages, tools)


def to_messages(returned: object) -> list[Message]:
    """Messages of what a map_fn returned.

    >>> to_messages({"conversation": [{"system": "Be brief.", "input": "Hi", "output": "Hello.", "loss": None}]})[0]
    {'role': 'system', 'content': 'Be brief.', 'weight': None}
    >>> to_messages({"text": "Once upon a time"})
    [{'role': 'text', 'content': 'Once upon a time', 'weight': 1}]

    An empty `input` stays an empty user message, so that turns alternate as in XTuner's rendering. Messages behind the
    last answer are left out: there is nothing to learn from them.
    """
    if not isinstance(returned, dict):
        raise RowError("bad_conversation", f"{SHAPES}; this one returned {short(returned)}")
    if "conversation" in returned:
        messages = _from_turns(returned["conversation"])
    elif "messages" in returned:
        messages = _from_messages(returned)
    elif "text" in returned:
        messages = [_message(TEXT_ROLE, answer_in(returned, "text"), 1)]
    else:
        raise RowError("bad_conversation", f"{SHAPES}; this one has the keys {', '.join(map(str, returned)) or 'none'}")
    if not any(message["weight"] for message in messages):
        raise RowError(
            "all_weights_zero", "no answer is trained: all of them have weight 0, or another mark that says so"
        )
    return messages


def content_digest(messages: list[Message], tools: str | None = None) -> bytes:
    """SHA-256 of roles, contents, thoughts, tool calls and tools. Weights do not count: a text has one side, however
    trained."""
    content: list[list[object]] = [[message["role"], message["content"], *_beside(message)] for message in messages]
    whole = {"messages": content, "tools": tools} if tools else content  # without them as ever: no row changes sides
    return hashlib.sha256(canonical_json(whole).encode("utf-8")).digest()


def _beside(message: Message) -> list[dict[str, str]]:
    """Thought and tool calls, where there are such; a speaker's name was never part of the digest."""
    found = {"tool_calls": message.get("tool_calls"), "tool_call_id": message.get("tool_call_id")}
    found["reasoning_content"] = message.get("reasoning_content")
    found["name"] = message.get("name") if message["role"] == "tool" else None
    kept = {key: value for key, value in found.items() if value}
    return [kept] if kept else []


def _from_turns(turns: object) -> list[Message]:
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise RowError("bad_conversation", f"'conversation' is not a list of turns: {short(turns)}")
    if not turns:
        raise RowError("no_turns", "the map_fn found no turn in the row")
    if turns[0].get("need_eos_token") is False and len(turns) == 1 and not turns[0].get("input"):
        thought_in(turns[0], "conversation[0]", "output", by_assistant=False)  # XTuner's pretrain
        weight = int(trained(turns[0], "conversation[0]", "output", by_assistant=True))
        return [_message(TEXT_ROLE, _output(turns[0], "conversation[0]"), weight)]
    messages = []
    for place, turn in enumerate(turns):
        where = f"conversation[{place}]"
        if turn.get("need_eos_token") is False:
            raise RowError(
                "bad_conversation", f"{where}: need_eos_token false is XTuner's plain text: one turn without an input"
            )
        system, request = _optional(turn, "system", where), _optional(turn, "input", where)
        if system:
            messages.append(_message("system", system, None))
        messages.append(_message("user", request, None))
        weight = int(trained(turn, where, "output", by_assistant=True))
        thought = thought_in(turn, where, "output", by_assistant=True)
        messages.append(_message("assistant", _output(turn, where), weight, thought))
    return messages


def _output(turn: Mapping[str, Any], where: str) -> str:
    output = turn.get("output")
    if not isinstance(output, str):
        raise RowError("bad_conversation", f"{where}.output is {short(output)}, not a text")
    return check_answer(output, f"{where}.output")


def _optional(turn: Mapping[str, Any], key: str, where: str) -> str:
    """A turn's text, empty where it is missing or null, as XTuner reads it."""
    value = turn.get(key)
    if value is not None and not isinstance(value, str):
        raise RowError("bad_conversation", f"{where}.{key} is {short(value)}, not a text")
    return value or ""


def _from_messages(returned: dict[str, Any]) -> list[Message]:
    messages, last = [], 0
    for place, message in enumerate(messages_in(returned)):
        name, where = message.get("role"), f"messages[{place}]"
        role = ROLES.get(name) if isinstance(name, str) else None
        if role is None:
            raise RowError("unknown_role", f"{where} has the role {name!r}; known are {', '.join(ROLES)}")
        calls = calls_text(calls_in(message, where), where)
        if calls and role != "assistant":
            raise RowError("tool_calls", f"{where} calls a tool, and is the {role}'s, not the assistant's")
        thought = thought_in(message, where, by_assistant=role == "assistant")
        content = "" if calls and message.get("content") is None else content_in(message, where)
        if role == "assistant":
            content = content if calls else check_answer(content, f"{where}.content")
        weight = trained(message, where, by_assistant=role == "assistant")
        kept = _message(role, content, int(weight) if role == "assistant" else None, thought)
        if calls:
            kept["tool_calls"] = calls
        if speaker := _label(message, "name", where):
            kept["name"] = speaker
        if call_id := _label(message, "tool_call_id", where):
            kept["tool_call_id"] = call_id
        messages.append(kept)
        last = len(messages) if role == "assistant" else last
    if not last:
        raise RowError("no_assistant_turn", "nothing to learn: no message is the assistant's")
    return messages[:last]


def _label(message: Mapping[str, Any], key: str, where: str) -> str | None:
    """A message's `name` or `tool_call_id`, None where it is missing or empty."""
    value = message.get(key)
    if value is not None and not isinstance(value, str):
        raise RowError("wrong_type", f"{where}.{key} is a {type(value).__name__}, not a text: {short(value)}")
    return check_utf8(value, f"{where}.{key}") if value else None


def _message(role: str, content: str, weight: int | None, thought: str | None = None) -> Message:
    message: Message = {"role": role, "content": check_utf8(content, role), "weight": weight}
    if thought:
        message["reasoning_content"] = check_utf8(thought, role)
    return message
