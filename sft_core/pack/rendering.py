"""A conversation as text, and which characters of it are trained.

In: messages, a tokenizer (for the names of its special tokens), a chat template. Out: renderings, usually one. What is
trained comes from the template's `{% generation %}` marks, else from the difference between rendered prefixes: what
`messages[:i + 1]` adds to `messages[:i]` with the generation prompt. Where a template rewrites earlier turns (thinking
models drop old thoughts), a turn is trained in the rendering that ends with it, as the served model writes it.

Tools: a message may hold `tool_calls` (a list, or its JSON text as the store has it), `name` and `tool_call_id`, a row
`tools`. They go to the template in Hugging Face's form; one that has no place for them is no template for such rows.
"""

import json
import os
import re
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError

from sft_core.errors import RecipeError, RowError
from sft_core.pack.controls import Controls, controls_of
from sft_core.pack.template import Span, compiled_template

TOOLS_VARIABLE = re.compile(r"\btools\b")
Tools = SequenceOf[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class TrainedSpan:
    """Characters `start` to `end` are trained; they belong to message `turn`."""

    start: int
    end: int
    turn: int


@dataclass(frozen=True, slots=True)
class Rendering:
    """`text` of the first `messages` messages. `typed`: contents hold special tokens' strings, cloaked in `text`."""

    text: str
    spans: tuple[TrainedSpan, ...]
    messages: int
    typed: bool


def render_conversation(
    messages: SequenceOf[dict[str, Any]], tokenizer: Any, chat_template: str, tools: Tools | None = None
) -> list[Rendering]:
    """Renderings in which every trained turn stands once. RowError if the template cannot render the messages.

    `tools`: JSON schemas of the functions that the model may call, as `apply_chat_template` takes them.
    """
    controls = controls_of(tokenizer)
    if not messages:
        raise RowError("empty_conversation", "there are no messages")
    chat = [plain_message(message, None) for message in messages]
    typed = any(controls.typed_in(message[key]) for message in chat for key in message if key != "role")
    typed = typed or (tools is not None and controls.typed_in(tools))
    if typed:
        chat = [plain_message(message, controls) for message in chat]
        tools = _cloak(tools, controls)
    if any(message["role"] == "text" for message in chat):
        return [_render_text(messages, chat, tokenizer, typed)]
    if "tool_calls" not in chat_template and any(message.get("tool_calls") for message in chat):
        raise RowError("tool_calls", "the chat template does not render tool calls; they would be lost")
    if tools and not TOOLS_VARIABLE.search(chat_template):
        raise RowError("tools", "the chat template does not render tools; they would be lost")
    renders = _Renders(chat, tokenizer, chat_template, tools)
    whole = renders.upto(len(chat))[0]
    groups: list[tuple[str, list[TrainedSpan], int]] = []  # last turns first
    for turn in reversed([i for i, message in enumerate(messages) if _is_trained(message)]):
        text, spans = renders.trained_turn(turn)
        if groups and groups[-1][0].startswith(text):
            groups[-1][1][:0] = spans
        elif not groups and whole.startswith(text):
            groups.append((whole, spans, len(chat)))
        else:
            groups.append((text, spans, turn + 1))
    return [
        Rendering(text, tuple(_trim(text, span, controls) for span in spans), count, typed)
        for text, spans, count in reversed(groups or [(whole, [], len(chat))])
    ]


class _Renders:
    """Renderings of a conversation's first messages, each made once."""

    def __init__(self, chat: list[dict[str, Any]], tokenizer: Any, chat_template: str, tools: Tools | None) -> None:
        self._chat = chat
        self._tools = list(tools) if tools else None
        self._tokenizer = tokenizer
        self._template = chat_template
        self._made: dict[tuple[int, bool], tuple[str, list[Span]]] = {}

    def upto(self, count: int, prompt: bool = False) -> tuple[str, list[Span]]:
        """Text of `messages[:count]` and what the template marks in it; with `prompt`, the opening of an answer."""
        if (count, prompt) not in self._made:
            self._made[count, prompt] = self._render(count, prompt) if count or prompt else ("", [])
        return self._made[count, prompt]

    def trained_turn(self, turn: int) -> tuple[str, list[TrainedSpan]]:
        """Text up to and with message `turn`, and its trained spans."""
        through, marks = self.upto(turn + 1)
        if compiled_template(self._template, self._tokenizer).marked:
            earlier = any(message["role"] == "assistant" for message in self._chat[:turn])
            floor = _common_length(self.upto(turn)[0], through) if earlier else 0
            spans = [TrainedSpan(start, end, turn) for start, end in marks if start >= floor and end > start]
            if not spans:
                raise RowError(
                    "unmarked_turn", f"message {turn}: the template's generation marks leave this answer out"
                )
            return through, spans
        prompt = self.upto(turn, prompt=True)[0]
        start = _common_length(prompt, through)
        if start < len(prompt) and start < len(self.upto(turn)[0]):
            raise RowError(
                "rewritten_prompt",
                f"message {turn}: the template renders the messages before it otherwise once it is there, so what it "
                "adds cannot be told; put {% generation %} marks round the answer in the template",
            )
        return through, [TrainedSpan(start, len(through), turn)]

    def _render(self, count: int, prompt: bool) -> tuple[str, list[Span]]:
        try:
            compiled = compiled_template(self._template, self._tokenizer)
            return compiled.render(self._chat[:count], self._tools, prompt)
        except TemplateSyntaxError as error:
            raise RecipeError(f"pack.chat_template, line {error.lineno}: not Jinja: {error.message}") from None
        except (TemplateError, TypeError) as error:
            raise RowError("template_error", f"the chat template refuses messages 0..{count - 1}: {error}") from None


def _is_trained(message: dict[str, Any]) -> bool:
    weight = message.get("weight")
    return message["role"] == "assistant" and (weight is None or weight > 0)


def plain_message(message: dict[str, Any], controls: Controls | None) -> dict[str, Any]:
    """The message as the template sees it: no weight, no empty keys, tool calls as a list, special tokens' strings
    cloaked."""
    kept = {key: value for key, value in message.items() if value is not None and key not in ("role", "weight")}
    if "tool_calls" in kept:
        kept["tool_calls"] = _dicts_in(kept["tool_calls"], "tool_calls")
    cloaked = _cloak(kept, controls) if controls else kept
    return {"role": message["role"], "content": "", **cloaked}


def tools_of(row: dict[str, Any]) -> Tools | None:
    """The tools of a stored row: its column `tools`, JSON text or null. RowError if it holds something else."""
    return _dicts_in(row["tools"], "tools") if row.get("tools") else None


def _dicts_in(value: Any, where: str) -> list[dict[str, Any]]:
    """A list of mappings, or the JSON text of one."""
    try:
        parsed = json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise RowError("tools", f"{where} is not JSON: {error}") from None
    if not isinstance(parsed, list) or not all(isinstance(entry, dict) for entry in parsed):
        raise RowError("tools", f"{where} is not a list of objects: {str(value)[:80]!r}")
    return parsed


def _cloak(value: Any, controls: Controls) -> Any:
    """`value` with special tokens' strings cloaked, keys of mappings included: a tool's argument may be called so."""
    if isinstance(value, dict):
        return {controls.cloak(key): _cloak(part, controls) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_cloak(part, controls) for part in value]
    return controls.cloak(value)


def _render_text(
    messages: SequenceOf[dict[str, Any]], chat: list[dict[str, Any]], tokenizer: Any, typed: bool
) -> Rendering:
    """Plain text: no template, the tokenizer's own opening (BOS or nothing), everything trained, eos at the end."""
    if len(chat) != 1:
        raise RowError("mixed_text", "a message of role `text` must be the only one")
    if tokenizer.eos_token is None:
        raise RowError("no_eos_token", "plain text ends with eos, and the tokenizer has none")
    opening = tokenizer("").input_ids
    bos = tokenizer.bos_token if opening and opening[0] == tokenizer.bos_token_id else ""
    text = bos + chat[0]["content"] + tokenizer.eos_token
    trained = messages[0].get("weight") != 0
    return Rendering(text, (TrainedSpan(len(bos), len(text), 0),) if trained else (), 1, typed)


def _common_length(prefix: str, text: str) -> int:
    return len(prefix) if text.startswith(prefix) else len(os.path.commonprefix([prefix, text]))


def _trim(text: str, span: TrainedSpan, controls: Controls) -> TrainedSpan:
    """White space after the end token is not trained: an answer is over at its end token."""
    trained = text[span.start : span.end].rstrip()
    if trained.endswith(controls.ends):
        return TrainedSpan(span.start, span.start + len(trained), span.turn)
    return span
