"""map_fns for rows of several turns: XTuner's oasst1, openai and wizardlm; messages, sharegpt and prompt_completion.

In: a row (dict). Out: `{"conversation": [turn, ...]}` as XTuner 0.2.0 returns it wherever the row is well formed, or
`{"messages": [...], "tools"?}`. A row that is not well formed raises RowError (reasons: `sft_core.normalize`).
"""

import re
from typing import Any

from sft_core.errors import RowError
from sft_core.normalize.columns import (
    Returned,
    Row,
    answer_in,
    check_answer,
    holds_messages,
    messages_in,
    short,
    system_in,
    text_in,
)
from sft_core.normalize.content import content_in
from sft_core.normalize.marks import mark_of, trained
from sft_core.normalize.thoughts import thought_in
from sft_core.normalize.tool_calls import calls_in, holds_calls

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
    have) is trained; other marks are read too (`marks`); system messages in a row are joined with a newline (XTuner
    keeps the last); a content that is a list of text parts is joined; an answer's thought is its `reasoning_content`.
    A column system is used where no message is the system's. A row without an answer is `no_assistant_turn`; roles
    such as tool are `unknown_role`, tool calls are `tool_calls`: the map_fn `messages` keeps them.
    """
    messages = messages_in(row)
    first = next((at for at, message in enumerate(messages) if message.get("role") != "assistant"), len(messages))
    system, request = _system_beside(messages, row), ""
    turns: list[dict[str, Any]] = []
    for place, message in enumerate(messages[first:], start=first):
        role, where = message.get("role"), f"messages[{place}]"
        if role not in ("system", "user", "assistant"):
            raise RowError("unknown_role", f"{where} has the role {role!r}; {MESSAGES_KEEPS}")
        if holds_calls(message):
            raise RowError("tool_calls", f"{where} calls a tool; {MESSAGES_KEEPS}")
        thought = thought_in(message, where, by_assistant=role == "assistant")
        learned = trained(message, where, by_assistant=role == "assistant")
        if role == "system":
            content = content_in(message, where)
            system = f"{system}\n{content}" if system else content
        elif role == "user":
            request += content_in(message, where)
        else:
            answer = check_answer(content_in(message, where), f"{where}.content")
            turn = {"system": system, "input": request, "output": answer, "output_with_loss": learned}
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
        if holds_calls(message, "value"):
            raise RowError("tool_calls", f"{where} calls a tool; sharegpt keeps it")
        thought = thought_in(message, where, "value", by_assistant=role == "gpt")
        mark = {} if trained(message, where, "value", by_assistant=role == "gpt") else {"output_with_loss": False}
        begun = begun or role == "human"
        if role == "human":
            request += text_in(message, "value", where)
        elif begun:
            answer = check_answer(text_in(message, "value", where), f"{where}.value")
            turns.append(_with_thought({"input": request, "output": answer, **mark}, thought))
            request = ""
    if not turns:
        raise RowError("no_assistant_turn", "nothing to learn: no message is gpt's after a human's")
    return {"conversation": turns}


def messages(row: Row) -> Returned:
    """Column messages in OpenAI's and HF's shape, and columns tools and system where there are such; not XTuner's.

    >>> messages({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]})
    {'messages': [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello.'}]}

    Every message stays as it is, none is joined or skipped; tool calls, tool messages and tools are kept (what becomes
    of them: `sft_core.normalize.conversation`). `weight: 0` and other marks leave an answer untrained (`marks`).
    """
    kept = messages_in(row)
    return _with_tools(_opening(kept, row) + kept, row)


def prompt_completion(row: Row) -> Returned:
    """Columns prompt and completion (or response): two texts, or TRL's lists of messages; not XTuner's.

    >>> prompt_completion({"prompt": "Print 1.", "completion": "print(1)"})
    {'conversation': [{'input': 'Print 1.', 'output': 'print(1)'}]}
    >>> prompt_completion({"prompt": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}],
    ...                    "completion": [{"role": "assistant", "content": "Hello."}]})["messages"][1:]
    [{'role': 'assistant', 'content': 'Yes?', 'weight': 0}, {'role': 'assistant', 'content': 'Hello.'}]

    Of messages only the completion's answers are trained, as TRL does (dataset formats, "Conversational"). No system
    prompt is added, unlike code_alpaca and tiny_codes; columns system and tools are used.
    """
    name = "completion" if "completion" in row else "response"
    listed = [column for column in ("prompt", name) if holds_messages(row.get(column))]
    if not listed or (len(listed) == 1 and isinstance(row[listed[0]], str)):  # JSON text beside a plain one is a text
        turn = {"input": text_in(row, "prompt"), "output": answer_in(row, name)}
        system = system_in(row)
        if not (row.get("tools") or row.get("functions")):
            return {"conversation": [{"system": system, **turn} if system else turn]}
        listed = []
    before = messages_in(row, "prompt") if "prompt" in listed else [{"role": "user", "content": text_in(row, "prompt")}]
    after = messages_in(row, name) if name in listed else [{"role": "assistant", "content": answer_in(row, name)}]
    if not any(message.get("role") == "assistant" for message in after):
        raise RowError("no_assistant_turn", f"nothing to learn: no message of column {name!r} is the assistant's")
    before = [_untrained(message, f"prompt[{place}]") for place, message in enumerate(before)]
    return _with_tools(_opening(before, row) + before + after, row)


def sharegpt(row: Row) -> Returned:
    """Column conversations, whose messages have `from` and `value`; columns system and tools where there are such.

    >>> sharegpt({"system": "Be brief.", "conversations": [
    ...     {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]})["messages"][:2]
    [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': 'Hi'}]

    Not XTuner's. Roles: human or user, gpt or assistant, system, function_call (JSON: name and arguments, one or a
    list), observation or tool. `role` and `content` stand for `from` and `value`. Thoughts, and OpenAI's keys for tool
    calls, are kept. Answers at the very start, before any request, are skipped, as wizardlm does.
    """
    told = messages_in(row, "conversations")
    kept, begun = _opening(told, row), False
    for place, message in enumerate(told):
        where = f"conversations[{place}]"
        name, key = message.get("from") or message.get("role"), "value" if "value" in message else "content"
        role = SHAREGPT_ROLES.get(name) if isinstance(name, str) else None
        if role is None:
            raise RowError("unknown_role", f"{where} is from {name!r}; known are {', '.join(SHAREGPT_ROLES)}")
        begun = begun or role in ("user", "tool", "function_call")
        answers = role in ("assistant", "function_call")
        thought = thought_in(message, where, key, by_assistant=answers)
        weight = {"weight": int(trained(message, where, key, by_assistant=True))} if answers else {}
        beside = _with_thought({name: message[name] for name in CARRIED if message.get(name)}, thought)
        if called := calls_in(message, where, key):
            beside = {**beside, "tool_calls": called}
        calls = "tool_calls" in beside or "function_call" in beside
        content = "" if calls and message.get(key) is None else content_in(message, where, key)
        if role == "function_call":
            if calls:
                raise RowError("tool_calls", f"{where} calls a tool in its {key} and under a key of its own")
            kept.append({"role": "assistant", "content": "", "tool_calls": content, **weight, **beside})
        elif role == "assistant" and begun:
            answer = content if calls else check_answer(content, f"{where}.{key}")
            kept.append({"role": role, "content": answer, **weight, **beside})
        elif role != "assistant":
            trained(message, where, key, by_assistant=False)
            kept.append({"role": role, "content": content, **beside})
    return _with_tools(kept, row)


def _system_beside(messages: list[dict[str, Any]], row: Row) -> str:
    """The system prompt in a column of its own; empty where it is in the messages already."""
    system = system_in(row)
    names = [message.get("role") or message.get("from") for message in messages]
    there = [message for message, name in zip(messages, names, strict=True) if name in ("system", "developer")]
    if not system or not there:
        return system
    said = content_in(there[0], "the system's message", "value" if "value" in there[0] else "content")
    if said.strip() != system.strip():
        raise RowError(
            "unread_column", f"column system and the system's message differ: {short(system)}, {short(said)}"
        )
    return ""


def _opening(messages: list[dict[str, Any]], row: Row) -> list[dict[str, Any]]:
    """The system message that a column of its own makes."""
    system = _system_beside(messages, row)
    return [{"role": "system", "content": system}] if system else []


def _untrained(message: dict[str, Any], where: str) -> dict[str, Any]:
    """A message of a prompt, its answer marked as not trained."""
    if message.get("role") != "assistant":
        return message
    if mark_of(message, where):
        raise RowError("bad_mark", f"{where} is marked as trained, and only the completion is")
    return {**message, "weight": 0}


def _with_tools(kept: list[dict[str, Any]], row: Row) -> Returned:
    tools = row.get("tools") or row.get("functions")
    if row.get("tools") and row.get("functions") and row["tools"] != row["functions"]:
        raise RowError("unread_column", "the columns tools and functions differ, and one of them is read")
    return {"messages": kept, "tools": tools} if tools else {"messages": kept}


def _with_thought(answer: dict[str, Any], thought: str | None) -> dict[str, Any]:
    return {**answer, "reasoning_content": thought} if thought else answer
