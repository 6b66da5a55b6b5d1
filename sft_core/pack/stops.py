"""The tokens that end an answer, and so stop generation: what a template writes behind its assistant's turns.

In: a tokenizer and a chat template. Out: `Stops`, for training (every trained turn ends with one), for evaluation and
for `eos_token_id` of generation_config.json. They are found by rendering: an answer, one with a thought, tool calls.
"""

import os
import re
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile
from typing import Any

from sft_core.errors import ModelError, RowError
from sft_core.pack.controls import controls_of
from sft_core.pack.renders import Renders, Tools, forms_of, in_form
from sft_core.pack.texts import end_of_turn_texts

_ASK = {"role": "user", "content": "ping"}
_CALL = {"type": "function", "id": "abcdefghi", "function": {"name": "ring", "arguments": {"bell": "loud"}}}
_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "ring",
            "description": "Ring a bell.",
            "parameters": {"type": "object", "properties": {"bell": {"type": "string", "description": "Which one."}}},
        },
    }
]
PROBES: tuple[tuple[dict[str, Any], Tools | None], ...] = (
    ({"role": "assistant", "content": "pong"}, None),
    ({"role": "assistant", "content": "pong", "reasoning_content": "played"}, None),
    ({"role": "assistant", "content": "", "tool_calls": [_CALL]}, _TOOLS),
    ({"role": "assistant", "content": "pong", "tool_calls": [_CALL]}, _TOOLS),
)
"""Answers of every kind, and the tools they call."""


@dataclass(frozen=True, slots=True)
class Stops:
    """`strings` end an answer. `candidates` matches every token that might; `eos` does for sure, `openers` stand before
    a user's text: a template may write the next one at once."""

    strings: tuple[str, ...]
    candidates: re.Pattern[str]
    eos: str | None
    openers: frozenset[str]

    def behind(self, renders: Renders, count: int, told: int) -> list[tuple[str, int]]:
        """The tokens that follow the last text of message `count - 1`, which ends at `told`, and where each ends; with
        the last of them the turn is over. A template may write more behind the last turn only: that is no turn's."""
        through, _ = renders.upto(count)
        found = [(match.group(), match.end()) for match in self.candidates.finditer(through, told)]
        if len(found) > 1:
            try:
                kept = len(os.path.commonprefix([through, renders.continued(count)]))
            except RowError:  # no user's message may follow: all of it is the turn's
                kept = len(through)
            found = [entry for entry in found if entry[1] <= kept] or found
        eos = next((place for place, (token, _) in enumerate(found) if token == self.eos), len(found))
        found = found[: eos + 1]
        return list(takewhile(lambda entry: entry[0] not in self.openers, found)) or found


@lru_cache(maxsize=32)
def stops_of(tokenizer: Any, chat_template: str) -> Stops:
    """The stops of a template with a tokenizer. Its eos is one, whatever the template writes."""
    controls = controls_of(tokenizer)
    eos = tokenizer.eos_token
    openers = _openers(controls.pattern, tokenizer, chat_template)
    found = _found(Stops((), controls.pattern, eos, openers), tokenizer, chat_template)
    if not found:  # tokenizers whose <|im_end|> is an added token like others
        added = re.compile(
            "|".join(re.escape(token) for token in sorted(controls.ends, key=len, reverse=True)) or "(?!)"
        )
        found = _found(Stops((), added, eos, frozenset()), tokenizer, chat_template, PROBES[:1])
    strings = tuple(dict.fromkeys([*found, *([eos] if eos is not None else [])]))
    words = sorted({*controls.ids, *strings}, key=lambda word: (-len(word), word))
    return Stops(strings, re.compile("|".join(map(re.escape, words)) or "(?!)"), eos, openers)


def stop_token_ids(tokenizer: Any, chat_template: str) -> list[int]:
    """Ids by which an answer is over, for `eos_token_id` of generation_config.json. ModelError if there are none.

    With `gemma` that is `[<end_of_turn>, <eos>]`, with `qwen_chat` on a base model `[<|im_end|>, <|endoftext|>]`.
    """
    ids = tokenizer.convert_tokens_to_ids(list(stops_of(tokenizer, chat_template).strings))
    if not ids:
        raise ModelError(
            f"{tokenizer.name_or_path}: no token ends an answer: the chat template writes none behind it, and the "
            "tokenizer has no eos_token; set one in tokenizer_config.json"
        )
    return list(dict.fromkeys(ids))


def _openers(pattern: re.Pattern[str], tokenizer: Any, chat_template: str) -> frozenset[str]:
    """The special token that stands last before a user's text."""
    try:
        asked = Renders([_ASK], tokenizer, chat_template, None).upto(1)[0]
    except RowError:
        return frozenset()
    before = asked.partition(_ASK["content"])[0]
    return frozenset(pattern.findall(before)[-1:])


def _found(stops: Stops, tokenizer: Any, chat_template: str, probes: Any = PROBES) -> list[str]:
    """The tokens that end the probes' answers, in their order; none that opens an answer. Behind a text all may end it,
    behind a call the last: others stand between two calls."""
    found = list[str]()
    for answer, tools in probes:
        chat = [_ASK, answer]
        for form in forms_of(chat):
            endings = _endings(stops, in_form(chat, form), tokenizer, chat_template, tools)
            if endings:
                found += endings[-1:] if tools else endings
                break
    return list(dict.fromkeys(found))


def _endings(
    stops: Stops, chat: list[dict[str, Any]], tokenizer: Any, chat_template: str, tools: Tools | None
) -> list[str]:
    renders = Renders(chat, tokenizer, chat_template, tools)
    try:
        through, asked = renders.upto(2)[0], renders.upto(1)[0]
        prompt = renders.upto(1, prompt=True)[0]
        start = len(os.path.commonprefix([prompt, through]))
        told = end_of_turn_texts(through, (start, len(through)), chat[1], 1)
        found = stops.behind(renders, 2, told)
    except RowError:
        return []
    opening = prompt[len(os.path.commonprefix([prompt, asked])) :]
    return [token for token, _ in found if token not in opening]
