"""map_fns for rows of several turns: oasst1, openai, wizardlm (XTuner's), messages and sharegpt (ours, with tools).

In: a row (dict). Out: `{"conversation": [turn, ...]}` as XTuner 0.2.0 returns it wherever the row is well formed, or
`{"messages": [...], "tools"?}`. A row that is not well formed raises RowError (reasons: `sft_core.normalize`).
"""

import re
from typing import Any

from sft_core.errors import RowError
from sft_core.normalize.columns import Returned, Row, check_answer, messages_in, short, text_in
from sft_core.normalize.content import content_in
from sft_core.normalize.thoughts import thought_in

MARKER = re.compile(r"(?<!#)###\s*(Human|Assistant):")
MESSAGES_KEEPS = "openai knows system, user and assistant; the map_fn messages keeps tool messages and calls"
CARRIED = ("name", "tool_call_id", "tool_calls", "function_call")
"""OpenAI's keys, which messages with `from` and `value` have at times."""
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "function_call",
    "observation": "tool",
    "tool": "tool",
}


def oasst1(row: Row) -> Returned:
    """Column text, in openassistant-guanaco's layout.

    >>> oasst1({"text": "### Human: Hi### Assistant: Hello.### Human: Plan?### Assistant: ### Step 1\\nRest."})
    {'conversation': [{'input': 'Hi', 'output': 'Hello.'}, {'input': 'Plan?', 'output': '### Step 1\\nRest.'}]}
    >>> oasst1({"text": "### Human: Hi### Assistant: Hello.### Human: And?"})
    {'conversation': [{'input': 'Hi', 'output': 'Hello.'}]}

    A turn begins at `### Human:` or `### Assistant:`, wherever it stands (guanaco puts it right behind the text before,
    other files behind a blank), but not as part of `####`. Any other `###`, such as a heading, belongs to its turn;
    XTuner cuts the answer there. A last request without an answer, or with an empty one, is dropped. Turns that do not
    alternate from Human on, and text before the first, are set aside as `bad_turn_order`: XTuner pairs turns by
    position, so that after a missing answer it would train on requests.
    """
    text = text_in(row, "text").strip()
    prefix, *parts = MARKER.split(text)
    if not parts:
        raise RowError("no_turns", f"no '### Human:' in {short(text)}")
    if prefix.strip():
        raise RowError("bad_turn_order", f"text before the first '### Human:': {short(prefix)}")
    roles, texts = parts[::2], [part.strip() for part in parts[1::2]]
    for place, role in enumerate(roles):
        if role != ("Human", "Assistant")[place % 2]:
            raise RowError("bad_turn_order", f"turn {place + 1} is {role}'s: {short(texts[place])}")
    if len(texts) % 2 == 0 and not texts[-1]:
        texts.pop()  # an open "### Assistant:" at the end: the last request has no answer
    turns = [{"input": texts[at], "output": texts[at + 1]} for at in range(0, len(texts) - 1, 2)]
    if not turns:
        raise RowError("empty_answer", f"no answer follows {short(texts[0])}")
    for turn in turns:
        check_answer(turn["output"], "text")
    return {"conversation": turns}


def openai(row: Row) -> Returned:
    """Column messages, with the roles system, user and assistant.

    >>> openai({"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
    ...                      {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "Bye"}]})
    {'conversation': [{'system': 'Be brief.', 'input': 'Hi', 'output': 'Hello.', 'output_with_loss': True}]}

    As in XTuner: answers at the very start are skipped, user messages in a row are joined without a separator, a system
    message goes with the next answer only, an answer with `loss` "False" is not trained, a user message without an
    answer at the end is dropped. Unlike XTuner: a `loss` of null (what Arrow makes of a key that only some messages
    have) is trained; `weight: 0`, OpenAI's own mark, is not; system messages in a row are joined with a newline (XTuner
    keeps the last); a content that is a list of text parts is joined; an answer's thought is its `reasoning_content`.
    A row without an answer is `no_assistant_turn`; roles such as tool are `unknown_role`, tool calls are `tool_calls`:
    the map_fn `messages` keeps them.
    """
    messages = messages_in(row)
    first = next((at for at, message in enumerate(messages) if message.get("role") != "assistant"), len(messages))
    system, request = "", ""
    turns: list[dict[str, Any]] = []
    for place, message in enumerate(messages[first:], start=first):
        role, where = message.get("role"), f"messages[{place}]"
        if role not in ("system", "user", "assistant"):
            raise RowError("unknown_role", f"{where} has the role {role!r}; {MESSAGES_KEEPS}")
        if message.get("tool_calls") or message.get("function_call"):
            raise RowError("tool_calls", f"{where} calls a tool; {MESSAGES_KEEPS}")
        thought = thought_in(message, where, by_assistant=role == "assistant")
        if role == "system":
            content = content_in(message, where)
            system = f"{system}\n{content}" if system else content
        elif role == "user":
            request += content_in(message, where)
        else:
            answer = check_answer(content_in(message, where), f"{where}.content")
            turn = {"system": system, "input": request, "output": answer, "output_with_loss": _trained(message)}
            turns.append(_with_thought(turn, thought))
            system, request = "", ""
    if not turns:
        roles = ", ".join(str(message.get("role")) for message in messages)
        raise RowError("no_assistant_turn", f"nothing to learn: the roles are {roles}")
    return {"conversation": turns}


def wizardlm(row: Row) -> Returned:
    """Column conversations, whose messages have `from` (human, gpt) and `value`.

    >>> wizardlm({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]})
    {'conversation': [{'input': 'Hi', 'output': 'Hello.'}]}

    As in XTuner: answers at the very start are skipped, requests in a row are joined without a separator, a last one
    without an answer is dropped. Unlike XTuner: another role sets the row aside (XTuner: ends the run), and so do a
    tool call and a row without an answer; an answer's thought is its `reasoning_content`. `sharegpt` reads more.
    """
    turns: list[dict[str, Any]] = []
    request, begun = "", False
    for place, message in enumerate(messages_in(row, "conversations")):
        role, where = message.get("from"), f"conversations[{place}]"
        if role not in ("human", "gpt"):
            raise RowError(
                "unknown_role", f"{where} is from {role!r}; wizardlm knows human and gpt, sharegpt knows more"
            )
        if message.get("tool_calls") or message.get("function_call"):
            raise RowError("tool_calls", f"{where} calls a tool; sharegpt keeps it")
        thought = thought_in(message, where, "value", by_assistant=role == "gpt")
        begun = begun or role == "human"
        if role == "human":
            request += text_in(message, "value", where)
        elif begun:
            answer = check_answer(text_in(message, "value", where), f"{where}.value")
            turns.append(_with_thought({"input": request, "output": answer}, thought))
            request = ""
    if not turns:
        raise RowError("no_assistant_turn", "nothing to learn: no message is gpt's after a human's")
    return {"conversation": turns}


def messages(row: Row) -> Returned:
    """Column messages in OpenAI's and HF's shape, and column tools where there is one; not XTuner's.

    >>> messages({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]})
    {'messages': [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello.'}]}

    Every message stays as it is, none is joined or skipped; tool calls, tool messages and tools are kept (what becomes
    of them: `sft_core.normalize.conversation`). `weight: 0`, or XTuner's `loss` "False", leaves an answer untrained.
    """
    kept = [message if _trained(message) else {**message, "weight": 0} for message in messages_in(row)]
    return _with_tools(kept, row)


def sharegpt(row: Row) -> Returned:
    """Column conversations, whose messages have `from` and `value`; columns system and tools where there are such.

    >>> sharegpt({"system": "Be brief.", "conversations": [
    ...     {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]})["messages"][:2]
    [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': 'Hi'}]

    Not XTuner's. Roles: human or user, gpt or assistant, system, function_call (JSON: name and arguments, one or a
    list), observation or tool. `role` and `content` stand for `from` and `value`. Thoughts, and OpenAI's keys for tool
    calls, are kept. Answers at the very start, before any request, are skipped, as wizardlm does.
    """
    kept: list[dict[str, Any]] = []
    if row.get("system"):
        kept.append({"role": "system", "content": text_in(row, "system")})
    begun = False
    for place, message in enumerate(messages_in(row, "conversations")):
        where = f"conversations[{place}]"
        name, key = message.get("from") or message.get("role"), "value" if "value" in message else "content"
        role = SHAREGPT_ROLES.get(name) if isinstance(name, str) else None
        if role is None:
            raise RowError("unknown_role", f"{where} is from {name!r}; known are {', '.join(SHAREGPT_ROLES)}")
        begun = begun or role in ("user", "tool", "function_call")
        thought = thought_in(message, where, key, by_assistant=role in ("assistant", "function_call"))
        beside = _with_thought({name: message[name] for name in CARRIED if message.get(name)}, thought)
        calls = "tool_calls" in beside or "function_call" in beside
        content = "" if calls and message.get(key) is None else content_in(message, where, key)
        if role == "function_call":
            if calls:
                raise RowError("tool_calls", f"{where} calls a tool in its {key} and under a key of its own")
            kept.append({"role": "assistant", "content": "", "tool_calls": content, **beside})
        elif role == "assistant" and begun:
            answer = content if calls else check_answer(content, f"{where}.{key}")
            kept.append({"role": role, "content": answer, "weight": 1 if _trained(message) else 0, **beside})
        elif role != "assistant":
            kept.append({"role": role, "content": content, **beside})
    return _with_tools(kept, row)


def _with_tools(kept: list[dict[str, Any]], row: Row) -> Returned:
    tools = row.get("tools") or row.get("functions")
    return {"messages": kept, "tools": tools} if tools else {"messages": kept}


def _with_thought(answer: dict[str, Any], thought: str | None) -> dict[str, Any]:
    return {**answer, "reasoning_content": thought} if thought else answer


def _trained(message: Row) -> bool:
    loss, weight = message.get("loss"), message.get("weight")
    return (loss is None or str(loss).lower() == "true") and (weight is None or bool(weight))
