"""msagent_react: MSAgent-Bench's conversations as ReAct text (Thought, Action, Action Input, Response, Final Answer).

In: a row whose column conversations is a list of messages (`from`, `value`), or such a list as text. The text is parsed
as data (`ast.literal_eval`, or JSON), never run. Out: XTuner 0.2.0's turns. XTuner drops a row, or a tool's response,
without a word where the mark-up cannot be read; here such a row is set aside (`tool_calls`).
"""

import ast
import json
import re
import warnings
from typing import Any

from sft_core.errors import RowError
from sft_core.normalize.columns import Returned, Row, check_answer, messages_in, short, text_in
from sft_core.normalize.marks import trained
from sft_core.normalize.thoughts import thought_in
from sft_core.normalize.tool_calls import holds_calls

THINK = re.compile(r"(.*?)<\|startofthink\|>(.*?)<\|endofthink\|>", re.DOTALL)
EXEC = re.compile(r"(.*?)<\|endofexec\|>(.*?)$", re.DOTALL)
EXEC_MARK = "<|startofexec|>"
INTRODUCTION = "你是一个可以调用外部工具的助手，可以使用的工具包括：\n"
FORMAT = (
    "如果使用工具请遵循以下格式回复：\n```\n"
    "Thought:思考你当前步骤需要解决什么问题，是否需要使用工具\n"
    "Action:工具名称，你的工具必须从 [{names}] 选择\n"
    "Action Input:工具输入参数\n```\n工具返回按照以下格式回复：\n```\n"
    "Response:调用工具后的结果\n```\n如果你已经知道了答案，或者你不需要工具，请遵循以下格式回复\n```\n"
    "Thought:给出最终答案的思考过程\nFinal Answer:最终答案\n```\n开始!\n"
)


def msagent_react(row: Row) -> Returned:
    r"""Column conversations, with the roles system, user and assistant.

    >>> msagent_react({"conversations": "[{'from': 'user', 'value': 'Hi'}, {'from': 'assistant', 'value': 'Hello.'}]"})
    {'conversation': [{'system': '', 'input': 'Hi\n', 'output': 'Final Answer:Hello.\n'}]}
    """
    messages = messages_in(_parsed(row), "conversations")
    if len(messages) < 2:
        raise RowError("no_turns", f"one message is no conversation: {short(messages)}")
    system, request = "", ""
    turns: list[dict[str, Any]] = []
    for place, message in enumerate(messages):
        role, where = message.get("from"), f"conversations[{place}]"
        if role not in ("system", "user", "assistant"):
            raise RowError("unknown_role", f"{where} is from {role!r}; msagent_react knows system, user, assistant")
        if holds_calls(message, "value"):
            raise RowError("tool_calls", f"{where} calls a tool in a key of its own; sharegpt keeps it")
        value = text_in(message, "value", where)
        thought = thought_in(message, where, "value", by_assistant=role == "assistant")
        learned = trained(message, where, "value", by_assistant=role == "assistant")
        if role == "system":
            system += _tools_prompt(value, where)
        elif role == "user":
            request += f"{value}\n"
        else:
            answer, mark, executed = value.partition(EXEC_MARK)
            unlearned = {} if learned else {"output_with_loss": False}
            turn = {"system": system, "input": request, "output": _answer(answer, where), **unlearned}
            turns.append({**turn, "reasoning_content": thought} if thought else turn)
            turns += [{**run, **unlearned} for run in _executed(executed, where)] if mark else []
            system, request = "", ""
    if not turns:
        raise RowError("no_assistant_turn", "nothing to learn: no message is the assistant's")
    return {"conversation": turns}


def _parsed(row: Row) -> Row:
    """The row with its conversations as a list, where they are text."""
    text = row.get("conversations")
    if not isinstance(text, str):
        return row
    for parse in (ast.literal_eval, json.loads):
        try:
            with warnings.catch_warnings(action="ignore"):  # `\d` in a literal is a SyntaxWarning
                return {"conversations": parse(text.strip())}
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):  # all that hostile text can raise
            continue
    raise RowError("wrong_type", f"column 'conversations' is neither a Python literal nor JSON: {short(text)}")


def _tools_prompt(value: str, where: str) -> str:
    """XTuner's system prompt of the tools that are described, as JSON objects, in a system message."""
    tools: dict[str, str] = {}
    for described in _objects(value):
        name, description = described["name"], described["description"]
        if not isinstance(name, str):
            raise RowError("tool_calls", f"{where}: a tool's name is {short(name)}, not a text")
        parameters = _parameters(described)
        known = isinstance(description, str) and parameters is not None
        tools[name] = f"{description}\n输入参数: {parameters}" if known else description
    return f"{INTRODUCTION}{tools}\n{FORMAT.format(names=list(tools))}"


def _objects(text: str) -> list[dict[str, Any]]:
    """JSON objects with a name and a description, wherever they begin in a text."""
    found, decode = [], json.JSONDecoder().raw_decode
    at = text.find("{")
    while at >= 0:
        end = at + 1
        try:
            value, behind = decode(text, at)
            if "name" in value and "description" in value:
                found.append(value)
                end = behind
        except (ValueError, RecursionError):
            pass  # a brace that opens no JSON
        at = text.find("{", end)
    return found


def _parameters(described: dict[str, Any]) -> dict[Any, Any] | None:
    """Names and descriptions of the parameters of a tool's first path; None where the tool has no such list."""
    try:
        return {entry["name"]: entry["description"] for entry in described["paths"][0]["parameters"]}
    except (KeyError, IndexError, TypeError):
        return None


def _answer(text: str, where: str) -> str:
    """What the model says before a tool runs: thoughts and actions, or at once the final answer."""
    written, count = THINK.subn(lambda match: _action(match[1], match[2], where), text)
    if "<|startofthink|>" in written:
        raise RowError("tool_calls", f"{where}: <|startofthink|> without <|endofthink|>: {short(written)}")
    return f"{written}\n" if count else f"Final Answer:{check_answer(written, f'{where}.value')}\n"


def _action(thought: str, call: str, where: str) -> str:
    called = _json(call, where)
    if not isinstance(called, dict) or not called.keys() >= {"api_name", "parameters"}:
        raise RowError("tool_calls", f"{where}: a call without api_name and parameters: {short(called)}")
    first = f"Thought:{thought.strip()}\n" if thought.strip() else ""
    return f"{first}Action:{called['api_name']}\nAction Input:{called['parameters']}\n"


def _executed(text: str, where: str) -> list[dict[str, Any]]:
    """The turn that answers from a tool's response; none where the response ends the message."""
    match = EXEC.match(text)
    if match is None or EXEC_MARK in text:
        raise RowError("tool_calls", f"{where}: not one {EXEC_MARK} ... <|endofexec|>: {short(text)}")
    response, final = _json(match[1], where), match[2].strip()
    answer = f"Final Answer:{final}\n{text[match.end() :]}"
    return [{"system": f"Response:{response}\n", "output": answer}] if final else []


def _json(text: str, where: str) -> Any:
    """JSON between the marks, out of its Markdown fence."""
    try:
        return json.loads(text.replace("```JSON", "").replace("```", "").replace("\n", ""))
    except (ValueError, RecursionError) as error:
        raise RowError("tool_calls", f"{where}: not JSON: {error}: {short(text)}") from None
