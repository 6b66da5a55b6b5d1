"""Scores of generated tool calls: the right tools, arguments that are JSON objects, both equal to the reference's.

In: the reference's calls, a generated text and the reference's as the template writes it. Out: `CallScore`, shares from
0 to 1. Templates write calls in many ways; read are all that hold the arguments as a JSON object, with the name inside
of an object around them or as a word before them. A text in another form (XML, Python) counts by being the reference's.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sft_core.evaluate.answers import behind_thought
from sft_core.json_text import value_or_text

NAMES, ARGUMENTS = ("name", "tool_name"), ("arguments", "parameters")
WORD = re.compile(r"[A-Za-z_][\w.-]*")
Call = tuple[str, Any]
"""Name and arguments."""


@dataclass(frozen=True, slots=True)
class CallScore:
    """Shares of the calls, of the reference or the answer, whichever has more: right name; arguments that are an
    object; name and arguments equal."""

    names: float
    arguments: float
    equal: float


def score_calls(reference: Sequence[Mapping[str, Any]], said: str, as_rendered: str) -> CallScore:
    """`said` against the reference's calls, in their order; thoughts do not count.

    >>> call = {"function": {"name": "ring", "arguments": {"bell": 1}}}
    >>> score_calls([call], 'ring {"bell": 2}', "")
    CallScore(names=1.0, arguments=1.0, equal=0.0)
    """
    said = behind_thought(said)
    if said == behind_thought(as_rendered):
        return CallScore(1.0, 1.0, 1.0)
    wanted = [_as_call(call) for call in reference]
    made = calls_in(said, {name for name, _ in wanted})
    most = max(len(wanted), len(made))
    pairs = list(zip(wanted, made, strict=False))
    return CallScore(
        names=sum(a[0] == b[0] for a, b in pairs) / most,
        arguments=sum(isinstance(b[1], dict) for _, b in pairs) / most,
        equal=sum(a == b for a, b in pairs) / most,
    )


def calls_in(text: str, known: set[str]) -> list[Call]:
    """The calls that a text makes. `known`: names that may stand as words before their arguments."""
    calls: list[Call] = []
    at = end = 0
    while (at := text.find("{", at)) >= 0:
        try:
            value, after = json.JSONDecoder().raw_decode(text, at)
        except (ValueError, RecursionError):
            at += 1
            continue
        calls += _calls_of(value, text[end:at], known)
        at = end = after
    return calls


def _calls_of(value: dict[str, Any], before: str, known: set[str]) -> list[Call]:
    function = value.get("function")
    inner = function if isinstance(function, dict) else value
    name = next((inner[key] for key in NAMES if isinstance(inner.get(key), str)), None)
    arguments = next((inner[key] for key in ARGUMENTS if key in inner), None)
    if name is not None and arguments is not None:
        return [(name, _parsed(arguments))]
    words = [word for word in WORD.findall(before) if word.removeprefix("functions.") in known]
    return [(words[-1].removeprefix("functions."), value)] if words else []


def _as_call(call: Mapping[str, Any]) -> Call:
    function = call.get("function") or call
    return function["name"], _parsed(function.get("arguments"))


def _parsed(arguments: Any) -> Any:
    """A mapping where it is the JSON text of one."""
    return value_or_text(arguments) if isinstance(arguments, str) else arguments
