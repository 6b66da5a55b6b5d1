"""map_fns for rows of one request and one answer, in columns of their own.

In: a row (dict). Out: `{"conversation": [turn]}` as XTuner 0.2.0 returns it wherever the row is well formed (dolly and
gsm8k are not XTuner's). A row that is not raises RowError; where they differ from XTuner, the docstring says how.
"""

import json

from sft_core.errors import RowError
from sft_core.normalize.columns import (
    Returned,
    Row,
    answer_in,
    check_answer,
    optional_in,
    short,
    system_in,
    text_in,
)
from sft_core.normalize.map_fns.prompts import ARXIV, CODER, COLORIST, LAWYER, MEDICAL, SQL


def alpaca(row: Row) -> Returned:
    r"""Columns instruction, input, output. The newline is there even when `input` is empty, as in XTuner.

    >>> alpaca({"instruction": "Add.", "input": "2 3", "output": "5"})
    {'conversation': [{'input': 'Add.\n2 3', 'output': '5'}]}
    >>> alpaca({"instruction": "Open it.", "input": "", "output": "<nooutput>"})
    {'conversation': []}

    >>> alpaca({"instruction": "And 1?", "output": "6", "history": [["2 + 3?", "5"]], "system": "Be brief."})
    {'conversation': [{'system': 'Be brief.', 'input': '2 + 3?', 'output': '5'}, {'input': 'And 1?\n', 'output': '6'}]}

    A missing or null `input` is an empty one (XTuner: KeyError, or the text "None"). Columns history and system, which
    XTuner drops, mean what they mean in LLaMA-Factory (data/README.md, src/llamafactory/data/converter.py): pairs of
    request and answer that come first, trained too; and the system prompt.
    """
    if row.get("output") == "<nooutput>":
        return {"conversation": []}
    turns = [*_history(row), {"input": _instruction(row), "output": answer_in(row, "output")}]
    if system := system_in(row):
        turns[0] = {"system": system, **turns[0]}
    return {"conversation": turns}


def alpaca_zh(row: Row) -> Returned:
    r"""Columns instruction_zh, input_zh, output_zh.

    >>> alpaca_zh({"instruction_zh": "Add.", "input_zh": "", "output_zh": "5", "output": "five"})
    {'conversation': [{'input': 'Add.\n', 'output': '5'}]}

    A missing or null `input_zh` is an empty one.
    """
    return {"conversation": [{"input": _instruction(row, "_zh"), "output": answer_in(row, "output_zh")}]}


def code_alpaca(row: Row) -> Returned:
    """Columns prompt, completion; with a programmer's system prompt.

    >>> code_alpaca({"prompt": "Print 1.", "completion": "print(1)"})["conversation"][0]["output"]
    'print(1)'
    >>> code_alpaca({"prompt": "Print 1.", "completion": "print(1)"})["conversation"][0]["system"] == CODER
    True
    """
    turn = {"system": CODER, "input": text_in(row, "prompt"), "output": answer_in(row, "completion")}
    return {"conversation": [turn]}


def tiny_codes(row: Row) -> Returned:
    """Columns prompt, response; with a programmer's system prompt. Indentation at the start of an answer stays.

    >>> tiny_codes({"prompt": "Body of f", "response": "    return 1"})["conversation"][0]["output"]
    '    return 1'
    """
    turn = {"system": CODER, "input": text_in(row, "prompt"), "output": answer_in(row, "response")}
    return {"conversation": [turn]}


def medical(row: Row) -> Returned:
    r"""Columns instruction, input, output; with a physician's system prompt, in Chinese.

    >>> medical({"instruction": "Fever?", "input": "", "output": "Rest."})["conversation"][0]["input"]
    'Fever?\n'

    A missing or null `input` is an empty one.
    """
    return {"conversation": [{"system": MEDICAL, "input": _instruction(row), "output": answer_in(row, "output")}]}


def default(row: Row) -> Returned:
    """Columns input, output; or a column conversation that is XTuner's common format already.

    >>> default({"input": "Hi", "output": "Hello."})
    {'conversation': [{'input': 'Hi', 'output': 'Hello.'}]}
    >>> default({"conversation": [{"system": "Be brief.", "input": "Hi", "output": "Hello."}]})
    {'conversation': [{'system': 'Be brief.', 'input': 'Hi', 'output': 'Hello.'}]}
    """
    if "conversation" in row and "output" not in row:
        return {"conversation": row["conversation"]}
    return {"conversation": [{"input": text_in(row, "input"), "output": answer_in(row, "output")}]}


def arxiv(row: Row) -> Returned:
    """Columns abstract, title; with an author's system prompt.

    >>> arxiv({"abstract": "We prove it.", "title": "A proof"})["conversation"][0]["output"]
    'A proof'
    """
    return {"conversation": [{"system": ARXIV, "input": text_in(row, "abstract"), "output": answer_in(row, "title")}]}


def colors(row: Row) -> Returned:
    """Columns description, color; with a designer's system prompt. What stands before the first colon is left out.

    >>> colors({"description": "Sky: a light: blue ", "color": "#87ceeb"})["conversation"][0]["input"]
    'a light: blue'

    A description without a colon is taken whole (XTuner: nothing of it).
    """
    name, colon, description = text_in(row, "description").partition(":")
    request = (description if colon else name).strip()
    return {"conversation": [{"system": COLORIST, "input": request, "output": answer_in(row, "color")}]}


def crime_kg_assitant(row: Row) -> Returned:
    """Columns input, output; with a lawyer's system prompt, in Chinese. The name is XTuner's.

    >>> crime_kg_assitant({"input": "May I?", "output": "No."})["conversation"][0]["output"]
    'No.'
    """
    return {"conversation": [{"system": LAWYER, "input": text_in(row, "input"), "output": answer_in(row, "output")}]}


def law_reference(row: Row) -> Returned:
    """Columns question, answer; with a lawyer's system prompt, in Chinese.

    >>> law_reference({"question": "May I?", "answer": "No."})["conversation"][0]["input"]
    'May I?'
    """
    return {"conversation": [{"system": LAWYER, "input": text_in(row, "question"), "output": answer_in(row, "answer")}]}


def openorca(row: Row) -> Returned:
    """Columns system_prompt, question, response.

    >>> openorca({"system_prompt": "Be brief.", "question": "Hi", "response": "Hello."})
    {'conversation': [{'system': 'Be brief.', 'input': 'Hi', 'output': 'Hello.'}]}

    A null `system_prompt` is an empty one (XTuner: None).
    """
    system = "" if row.get("system_prompt", "") is None else text_in(row, "system_prompt")
    return {
        "conversation": [{"system": system, "input": text_in(row, "question"), "output": answer_in(row, "response")}]
    }


def pretrain(row: Row) -> Returned:
    """Column text, as plain text; normalize makes one message of the role `text` of it.

    >>> pretrain({"text": " Once upon a time\\n"})
    {'conversation': [{'input': '', 'output': 'Once upon a time', 'need_eos_token': False}]}

    Each text ends with eos, so that texts do not run together when packed; XTuner's do.
    """
    return {"conversation": [{"input": "", "output": answer_in(row, "text").strip(), "need_eos_token": False}]}


def sql(row: Row) -> Returned:
    r"""Columns context (CREATE TABLE statements), question, answer; with an SQL expert's system prompt.

    >>> sql({"context": "CREATE TABLE t (a INT)", "question": "How many?", "answer": "SELECT COUNT(*) FROM t"})[
    ...     "conversation"][0]["input"]
    'CREATE TABLE t (a INT)\nHow many?'
    """
    request = f"{text_in(row, 'context')}\n{text_in(row, 'question')}"
    return {"conversation": [{"system": SQL, "input": request, "output": answer_in(row, "answer")}]}


def squad(row: Row) -> Returned:
    r"""Columns context, question, answers, as in SQuAD; or answer. Not XTuner's.

    >>> squad({"context": "Ann ran.", "question": "Who?", "answers": {"text": ["Ann", "Ann ran"]}})
    {'conversation': [{'input': 'Ann ran.\n\nWho?', 'output': 'Ann'}]}

    `answers` is a text, a list of texts, or a mapping whose `text` is such a list. The first is trained; a question
        without any is `empty_answer`.
    """
    column = "answers" if "answers" in row else "answer"
    answers = row.get(column)
    if isinstance(answers, dict):
        answers = answers.get("text")
    if isinstance(answers, list) and all(isinstance(answer, str) for answer in answers):
        answers = answers[0] if answers else ""
    request = f"{text_in(row, 'context')}\n\n{text_in(row, 'question')}"
    return {"conversation": [{"input": request, "output": answer_in({**row, column: answers}, column)}]}


def stack_exchange(row: Row) -> Returned:
    """Columns question, response.

    >>> stack_exchange({"question": "Why?", "response": "Because."})
    {'conversation': [{'input': 'Why?', 'output': 'Because.'}]}
    """
    return {"conversation": [{"input": text_in(row, "question"), "output": answer_in(row, "response")}]}


def dolly(row: Row) -> Returned:
    r"""Columns instruction, context, response; not XTuner's. The context follows after a blank line, if there is one.

    >>> dolly({"instruction": "Who?", "context": "Ann ran.", "response": "Ann."})
    {'conversation': [{'input': 'Who?\n\nAnn ran.', 'output': 'Ann.'}]}
    >>> dolly({"instruction": "Who?", "context": "", "response": "Ann."})
    {'conversation': [{'input': 'Who?', 'output': 'Ann.'}]}
    """
    instruction, context = text_in(row, "instruction"), optional_in(row, "context")
    request = f"{instruction}\n\n{context}" if context.strip() else instruction
    return {"conversation": [{"input": request, "output": answer_in(row, "response")}]}


def gsm8k(row: Row) -> Returned:
    """Columns question, answer; not XTuner's. The steps and the `#### 2` at the end of an answer stay.

    >>> gsm8k({"question": "1 + 1?", "answer": "<<1+1=2>>2\\n#### 2"})
    {'conversation': [{'input': '1 + 1?', 'output': '<<1+1=2>>2\\n#### 2'}]}
    """
    return {"conversation": [{"input": text_in(row, "question"), "output": answer_in(row, "answer")}]}


def _instruction(row: Row, suffix: str = "") -> str:
    """Alpaca's request: instruction, newline, input."""
    return f"{text_in(row, f'instruction{suffix}')}\n{optional_in(row, f'input{suffix}')}"


def _history(row: Row) -> list[dict[str, str]]:
    """Turns of the column history, a list of pairs; it may be JSON text."""
    history = row.get("history")
    if isinstance(history, str) and history.strip():
        try:
            history = json.loads(history)
        except (ValueError, RecursionError) as error:
            raise RowError("wrong_type", f"column 'history' is a text that is not JSON: {error}") from None
    turns = []
    for place, pair in enumerate(history or []) if isinstance(history or [], list) else [(0, history)]:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise RowError("wrong_type", f"history[{place}] is not a pair of texts: {short(pair)}")
        turns.append({"input": pair[0], "output": check_answer(pair[1], f"history[{place}]")})
    return turns
