"""The map_fns of XTuner's tutorial: one row in, `{"conversation": [turn, ...]}` out, under XTuner's names.

In: a row (dict). Out: what XTuner 0.2.0 returns for it, wherever the row is well formed. A row that is not raises
RowError (reasons: `sft_core.normalize`). They differ from XTuner where XTuner damages data; each docstring says how.
Texts of the system prompts: InternLM/xtuner v0.2.0, `xtuner/utils/templates.py`, SYSTEM_TEMPLATE, word for word.
"""

import re
from collections.abc import Callable
from typing import Any

from sft_core.errors import RowError
from sft_core.normalize.columns import Row, answer_in, check_answer, messages_in, short, text_in

Conversation = dict[str, Any]

MAP_FNS_VERSION = 1
"""Raised when a shipped map_fn's output changes."""

CODER = "You are a professional programer. Please provide the corresponding code based on the description of Human.\n"
MEDICAL = "如果你是一名医生，请根据患者的描述回答医学问题。\n"
MARKER = re.compile(r"(?<!#)###\s*(Human|Assistant):")


def alpaca(row: Row) -> Conversation:
    r"""Columns instruction, input, output. The newline is there even when `input` is empty, as in XTuner.

    >>> alpaca({"instruction": "Add.", "input": "2 3", "output": "5"})
    {'conversation': [{'input': 'Add.\n2 3', 'output': '5'}]}
    >>> alpaca({"instruction": "Open it.", "input": "", "output": "<nooutput>"})
    {'conversation': []}

    A missing or null `input` is an empty one (XTuner: KeyError, or the text "None").
    """
    if row.get("output") == "<nooutput>":
        return {"conversation": []}
    return {"conversation": [{"input": _instruction(row), "output": answer_in(row, "output")}]}


def alpaca_zh(row: Row) -> Conversation:
    r"""Columns instruction_zh, input_zh, output_zh.

    >>> alpaca_zh({"instruction_zh": "Add.", "input_zh": "", "output_zh": "5", "output": "five"})
    {'conversation': [{'input': 'Add.\n', 'output': '5'}]}

    A missing or null `input_zh` is an empty one.
    """
    return {"conversation": [{"input": _instruction(row, "_zh"), "output": answer_in(row, "output_zh")}]}


def oasst1(row: Row) -> Conversation:
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


def openai(row: Row) -> Conversation:
    """Column messages, with the roles system, user and assistant.

    >>> openai({"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
    ...                      {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "Bye"}]})
    {'conversation': [{'system': 'Be brief.', 'input': 'Hi', 'output': 'Hello.', 'output_with_loss': True}]}

    As in XTuner: answers at the very start are skipped, user messages in a row are joined without a separator, a system
    message goes with the next answer only, an answer with `loss` "False" is not trained, a user message without an
    answer at the end is dropped. Unlike XTuner: a `loss` of null (what Arrow makes of a key that only some messages
    have) is trained; `weight: 0`, OpenAI's own mark, is not; system messages in a row are joined with a newline (XTuner
    keeps the last). A row without an answer is `no_assistant_turn`; roles such as tool are `unknown_role`, tool calls
    are `tool_calls`: they come in a later release.
    """
    messages = messages_in(row)
    first = next((at for at, message in enumerate(messages) if message.get("role") != "assistant"), len(messages))
    system, request = "", ""
    turns: list[dict[str, Any]] = []
    for place, message in enumerate(messages[first:], start=first):
        role, where = message.get("role"), f"messages[{place}]"
        if role not in ("system", "user", "assistant"):
            raise RowError("unknown_role", f"{where} has the role {role!r}; known are system, user, assistant")
        if message.get("tool_calls") or message.get("function_call"):
            raise RowError("tool_calls", f"{where} calls a tool; tool calls come in a later release")
        if role == "system":
            system = f"{system}\n{text_in(message, 'content', where)}" if system else text_in(message, "content", where)
        elif role == "user":
            request += text_in(message, "content", where)
        else:
            answer = answer_in(message, "content", where)
            turns.append({"system": system, "input": request, "output": answer, "output_with_loss": _trained(message)})
            system, request = "", ""
    if not turns:
        roles = ", ".join(str(message.get("role")) for message in messages)
        raise RowError("no_assistant_turn", f"nothing to learn: the roles are {roles}")
    return {"conversation": turns}


def code_alpaca(row: Row) -> Conversation:
    """Columns prompt, completion; with a programmer's system prompt.

    >>> code_alpaca({"prompt": "Print 1.", "completion": "print(1)"})["conversation"][0]["output"]
    'print(1)'
    >>> code_alpaca({"prompt": "Print 1.", "completion": "print(1)"})["conversation"][0]["system"] == CODER
    True
    """
    turn = {"system": CODER, "input": text_in(row, "prompt"), "output": answer_in(row, "completion")}
    return {"conversation": [turn]}


def tiny_codes(row: Row) -> Conversation:
    """Columns prompt, response; with a programmer's system prompt. Indentation at the start of an answer stays.

    >>> tiny_codes({"prompt": "Body of f", "response": "    return 1"})["conversation"][0]["output"]
    '    return 1'
    """
    turn = {"system": CODER, "input": text_in(row, "prompt"), "output": answer_in(row, "response")}
    return {"conversation": [turn]}


def medical(row: Row) -> Conversation:
    r"""Columns instruction, input, output; with a physician's system prompt, in Chinese.

    >>> medical({"instruction": "Fever?", "input": "", "output": "Rest."})["conversation"][0]["input"]
    'Fever?\n'

    A missing or null `input` is an empty one.
    """
    return {"conversation": [{"system": MEDICAL, "input": _instruction(row), "output": answer_in(row, "output")}]}


def default(row: Row) -> Conversation:
    """Columns input, output; or a column conversation that is XTuner's common format already.

    >>> default({"input": "Hi", "output": "Hello."})
    {'conversation': [{'input': 'Hi', 'output': 'Hello.'}]}
    >>> default({"conversation": [{"system": "Be brief.", "input": "Hi", "output": "Hello."}]})
    {'conversation': [{'system': 'Be brief.', 'input': 'Hi', 'output': 'Hello.'}]}
    """
    if "conversation" in row and "output" not in row:
        return {"conversation": row["conversation"]}
    return {"conversation": [{"input": text_in(row, "input"), "output": answer_in(row, "output")}]}


MAP_FNS: dict[str, Callable[[Row], Conversation]] = {
    "alpaca": alpaca,
    "alpaca_zh": alpaca_zh,
    "oasst1": oasst1,
    "openai": openai,
    "code_alpaca": code_alpaca,
    "medical": medical,
    "tiny_codes": tiny_codes,
    "default": default,
}

COLUMNS: dict[str, tuple[tuple[str, ...], ...]] = {
    "alpaca": (("instruction", "output"),),
    "alpaca_zh": (("instruction_zh", "output_zh"),),
    "oasst1": (("text",),),
    "openai": (("messages",),),
    "code_alpaca": (("prompt", "completion"),),
    "medical": (("instruction", "output"),),
    "tiny_codes": (("prompt", "response"),),
    "default": (("conversation",), ("input", "output")),
}
"""The columns that each cannot do without; more than one way to fit for `default`."""


def suggest_map_fns(row: object) -> tuple[str, ...]:
    """Names of the shipped map_fns that can read a row's columns, the best fit first.

    >>> suggest_map_fns({"prompt": "Print 1.", "response": "print(1)"})
    ('tiny_codes',)
    >>> suggest_map_fns({"question": "1 + 1", "answer": "2"})
    ()
    """
    if not isinstance(row, dict):
        return ()
    return tuple(name for name, ways in COLUMNS.items() if any(row.keys() >= set(columns) for columns in ways))


def _instruction(row: Row, suffix: str = "") -> str:
    """Alpaca's request: instruction, newline, input."""
    column = f"input{suffix}"
    context = "" if row.get(column) is None else text_in(row, column)
    return f"{text_in(row, f'instruction{suffix}')}\n{context}"


def _trained(message: Row) -> bool:
    loss, weight = message.get("loss"), message.get("weight")
    return (loss is None or str(loss).lower() == "true") and (weight is None or bool(weight))
