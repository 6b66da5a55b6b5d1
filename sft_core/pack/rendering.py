"""A conversation as text, and which characters of it are trained.

In: messages, a tokenizer (for the names of its special tokens), a chat template. Out: renderings, usually one. What is
trained comes from the template's `{% generation %}` marks, else from the difference between rendered prefixes: what
`messages[:i + 1]` adds to `messages[:i]` with the generation prompt. Where a template rewrites earlier turns (thinking
models drop old thoughts), a turn is trained in the rendering that ends with it, as the served model writes it.
"""

import os
import re
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError

from sft_core.errors import RecipeError, RowError
from sft_core.pack.controls import Controls, controls_of

GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
Span = tuple[int, int]


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


def render_conversation(messages: SequenceOf[dict[str, Any]], tokenizer: Any, chat_template: str) -> list[Rendering]:
    """Renderings in which every trained turn stands once. RowError if the template cannot render the messages."""
    controls = controls_of(tokenizer)
    if not messages:
        raise RowError("empty_conversation", "there are no messages")
    typed = controls.typed_in([{**message, "role": ""} for message in messages])
    chat = [plain_message(message, controls if typed else None) for message in messages]
    if any(message["role"] == "text" for message in chat):
        return [_render_text(messages, chat, tokenizer, typed)]
    if "tool_calls" not in chat_template and any(message.get("tool_calls") for message in chat):
        raise RowError("tool_calls", "the chat template does not render tool calls; they would be lost")
    renders = _Renders(chat, tokenizer, chat_template)
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

    def __init__(self, chat: list[dict[str, Any]], tokenizer: Any, chat_template: str) -> None:
        self._chat = chat
        self._tokenizer = tokenizer
        self._template = chat_template
        self._marked = GENERATION_MARK.search(chat_template) is not None
        self._made: dict[tuple[int, bool], tuple[str, list[Span]]] = {}

    def upto(self, count: int, prompt: bool = False) -> tuple[str, list[Span]]:
        """Text of `messages[:count]` and what the template marks in it; with `prompt`, the opening of an answer."""
        if (count, prompt) not in self._made:
            self._made[count, prompt] = self._render(count, prompt) if count or prompt else ("", [])
        return self._made[count, prompt]

    def trained_turn(self, turn: int) -> tuple[str, list[TrainedSpan]]:
        """Text up to and with message `turn`, and its trained spans."""
        through, marks = self.upto(turn + 1)
        if self._marked:
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
        from transformers.utils.chat_template_utils import render_jinja_template  # imports torch

        try:
            texts, marks = render_jinja_template(
                conversations=[self._chat[:count]],
                chat_template=self._template,
                return_assistant_tokens_mask=self._marked,
                add_generation_prompt=prompt,
                **self._tokenizer.special_tokens_map,
            )
        except TemplateSyntaxError as error:
            raise RecipeError(f"pack.chat_template, line {error.lineno}: not Jinja: {error.message}") from None
        except (TemplateError, TypeError) as error:
            raise RowError("template_error", f"the chat template refuses messages 0..{count - 1}: {error}") from None
        return texts[0], list(marks[0]) if marks else []


def _is_trained(message: dict[str, Any]) -> bool:
    weight = message.get("weight")
    return message["role"] == "assistant" and (weight is None or weight > 0)


def plain_message(message: dict[str, Any], controls: Controls | None) -> dict[str, Any]:
    """The message as the template sees it: no weight, no empty keys, special tokens' strings cloaked."""
    kept = {key: value for key, value in message.items() if value is not None and key not in ("role", "weight")}
    cloaked = controls.cloak(kept) if controls else kept
    return {"role": message["role"], "content": "", **cloaked}


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
