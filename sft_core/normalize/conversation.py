"""What a map_fn returns, turned into messages: the shape that the store holds and every later step reads.

In: {"conversation": [{"system"?, "input"?, "output", "output_with_loss"?}, ...]}, {"messages": [...]} or {"text": ...}.
Out: [{"role", "content", "weight"}, ...]; weight is 1 (trained) or 0 on assistant messages, null on all others.
Plain text is one message of the role `text`, weight 1. RowError for anything else.
"""

import hashlib
from collections.abc import Mapping
from typing import Any, TypedDict

from sft_core.errors import RowError
from sft_core.fingerprint import canonical_json
from sft_core.normalize.columns import answer_in, check_answer, messages_in, short, text_in

TEXT_ROLE = "text"
SHAPES = "a map_fn returns {'conversation': [...]}, {'messages': [...]} or {'text': '...'}"


class Message(TypedDict):
    """One message. `weight` is null for all but answers and plain text."""

    role: str
    content: str
    weight: int | None


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
            "all_weights_zero", "no answer is trained: output_with_loss is false, or weight 0, in all of them"
        )
    return messages


def content_digest(messages: list[Message]) -> bytes:
    """SHA-256 of roles and contents. Weights do not count: a text has one side, however it is trained."""
    content = [[message["role"], message["content"]] for message in messages]
    return hashlib.sha256(canonical_json(content).encode("utf-8")).digest()


def _from_turns(turns: object) -> list[Message]:
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise RowError("bad_conversation", f"'conversation' is not a list of turns: {short(turns)}")
    if not turns:
        raise RowError("no_turns", "the map_fn found no turn in the row")
    messages = []
    for place, turn in enumerate(turns):
        where = f"conversation[{place}]"
        if turn.get("need_eos_token") is False:
            raise RowError(
                "bad_conversation", f"{where}: need_eos_token is XTuner's plain text; return {{'text': ...}}"
            )
        system, request = _optional(turn, "system", where), _optional(turn, "input", where)
        if system:
            messages.append(_message("system", system, None))
        messages.append(_message("user", request, None))
        weight = turn.get("output_with_loss")
        if weight not in (None, True, False):
            raise RowError("bad_conversation", f"{where}.output_with_loss is {short(weight)}, not true or false")
        messages.append(_message("assistant", _output(turn, where), 1 if weight is None else int(weight)))
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
        role, where = message.get("role"), f"messages[{place}]"
        if role not in ("system", "user", "assistant"):
            raise RowError("unknown_role", f"{where} has the role {role!r}; known are system, user, assistant")
        if message.get("tool_calls") or message.get("function_call"):
            raise RowError("tool_calls", f"{where} calls a tool; tool calls come in a later release")
        if role == "assistant":
            weight = message.get("weight")
            if weight not in (None, 0, 1):
                raise RowError("bad_conversation", f"{where}.weight is {short(weight)}, not 0 or 1")
            messages.append(_message(role, answer_in(message, "content", where), 1 if weight is None else int(weight)))
            last = len(messages)
        else:
            messages.append(_message(role, text_in(message, "content", where), None))
    if not last:
        raise RowError("no_assistant_turn", "nothing to learn: no message is the assistant's")
    return messages[:last]


def _message(role: str, content: str, weight: int | None) -> Message:
    try:
        content.encode("utf-8")
    except UnicodeEncodeError as error:
        code = f"U+{ord(content[error.start]):04X}"
        raise RowError("not_utf8", f"the {role}'s text holds half of a character, {code}, at {error.start}") from None
    return {"role": role, "content": content, "weight": weight}
