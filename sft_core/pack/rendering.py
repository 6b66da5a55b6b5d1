"""A conversation as text, and which characters of it are trained.

In: messages, a tokenizer (for the names of its special tokens), a chat template. Out: renderings, usually one. A turn
is trained from where the served prompt ends (`messages[:i]` with the generation prompt) to the token that ends the
turn; a template's `{% generation %}` marks must cover that. Where a template rewrites earlier turns (thinking models
drop old thoughts), a turn is trained in the rendering that ends with it, as the served model writes it.

Each trained turn is proved, and a row that fails is refused by a RowError: the text before it is the served prompt; its
own texts stand in what is trained, all messages before it in its context; it ends with a token that stops generation.

Tools: a message may hold `tool_calls` (a list, or its JSON text as the store has it), `name` and `tool_call_id`, a row
`tools`. They go to the template in Hugging Face's form; where something is lost by that, in the other forms that
servers feed (`renders.Form`).
"""

import os
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from typing import Any

from sft_core.errors import RowError
from sft_core.pack.controls import controls_of
from sft_core.pack.renders import AS_STORED, Form, Renders, Tools, cloak_values, forms_of, in_form, plain_message
from sft_core.pack.stops import Stops, stops_of
from sft_core.pack.texts import end_of_turn_texts, prove_texts, prove_tools
from sft_core.pack.thoughts import EMPTY, thinks_inline
from sft_core.pack.wanted import wanted_of

ENDING_CHARACTERS = 40
"""An empty thought that a prompt ends with is within so many."""
MENDED_BY_FORM = frozenset({"lost_text", "lost_thought", "tool_calls", "tools", "template_error"})
"""Reasons for which a row is rendered again in another form."""


@dataclass(frozen=True, slots=True)
class TrainedSpan:
    """Characters `start` to `end` are trained; they belong to message `turn`."""

    start: int
    end: int
    turn: int


@dataclass(frozen=True, slots=True)
class Rendering:
    """`text` of the first `messages` messages, given to the template in `form`. `typed`: contents hold special tokens'
    strings, cloaked in `text`. `parted`: the character at which the text is cut before it is tokenised, if any.
    `composed`: the text is a served prompt and the last message as the template writes it behind other ones."""

    text: str
    spans: tuple[TrainedSpan, ...]
    messages: int
    typed: bool
    form: Form = AS_STORED
    parted: int | None = None
    composed: bool = False


def render_conversation(
    messages: SequenceOf[dict[str, Any]], tokenizer: Any, chat_template: str, tools: Tools | None = None
) -> list[Rendering]:
    """Renderings in which every trained turn stands once. RowError if the template cannot render the messages, or
    renders something else than what the row says or a server will feed.

    `tools`: JSON schemas of the functions that the model may call, as `apply_chat_template` takes them.
    """
    controls = controls_of(tokenizer)
    if not messages:
        raise RowError("empty_conversation", "there are no messages")
    messages = wanted_of(messages, chat_template)
    chat = [plain_message(message, None) for message in messages]
    typed = any(controls.typed_in(message[key]) for message in chat for key in message if key != "role")
    typed = typed or (tools is not None and controls.typed_in(tools))
    if typed:
        chat = [plain_message(message, controls) for message in chat]
        tools = cloak_values(tools, controls)
    if any(message["role"] == "text" for message in chat):
        return [_render_text(messages, chat, tokenizer, typed)]
    trained = [i for i, message in enumerate(messages) if _is_trained(message)]
    stops = stops_of(tokenizer, chat_template)
    first_error: RowError | None = None
    for form in forms_of(chat):
        renders = Renders(in_form(chat, form), tokenizer, chat_template, tools)
        try:
            made = _proved(renders, trained, stops)
        except RowError as error:
            first_error = first_error or RowError(error.reason, controls.uncloak(error.detail))
            if error.reason not in MENDED_BY_FORM:
                break
        else:
            return [replace(rendering, typed=typed, form=form) for rendering in made]
    assert first_error is not None
    raise first_error


def _proved(renders: Renders, trained: SequenceOf[int], stops: Stops) -> list[Rendering]:
    """Renderings in which every turn of `trained` is trained once, proved."""
    count = len(renders.chat)
    whole = renders.upto(count)[0]
    groups: list[tuple[str, list[TrainedSpan], int, bool]] = []  # last turns first
    for turn in reversed(trained):
        text, span, composed = _trained_turn(renders, turn, stops)
        to_its_end = text[: span.end]
        if groups and groups[-1][0].startswith(to_its_end):
            groups[-1][1].insert(0, span)
        elif not groups and whole.startswith(to_its_end):
            groups.append((whole, [span], count, False))
        else:
            groups.append((text, [span], turn + 1, composed))
    for text, spans, messages, _ in groups:
        prove_texts(text, renders.chat[:messages], {span.turn: (span.start, span.end) for span in spans})
        if renders.tools:
            prove_tools(text, renders.tools)
    made = groups or [(whole, [], count, False)]
    return [
        Rendering(text, tuple(spans), messages, typed=False, composed=composed)
        for text, spans, messages, composed in reversed(made)
    ]


def _trained_turn(renders: Renders, turn: int, stops: Stops) -> tuple[str, TrainedSpan, bool]:
    """Text up to and with message `turn`, and what of it is trained: from the served prompt to the token that ends the
    turn. And whether the text was put together: of that prompt and the answer."""
    through, marks = renders.upto(turn + 1)
    prompt = _prompt(renders, turn)
    start = _start_of_answer(renders, turn, prompt)
    told = end_of_turn_texts(through, (start, len(through)), renders.chat[turn], turn)
    end = _end_of_turn(renders, turn, (start, told), stops)
    _check_thought(renders.chat[turn], turn, through, start)
    if renders.marked:
        at = start
        for first, last in sorted(marks):
            at = max(at, last) if first <= at else at
        if at < end:
            raise RowError(
                "unmarked_turn",
                f"message {turn}: the template's generation marks leave out {through[at:end][:60]!r}, which the model "
                "has to write",
            )
    if through.startswith(prompt):
        return through, TrainedSpan(start, end, turn), False
    return prompt + through[start:end], TrainedSpan(len(prompt), len(prompt) + end - start, turn), True


def _prompt(renders: Renders, turn: int) -> str:
    """What a server feeds for message `turn`."""
    try:
        prompt = renders.upto(turn, prompt=True)[0]
    except RowError as error:
        if turn:
            raise
        raise RowError("assistant_first", f"the first message is an answer: {error.detail}") from None
    if turn == 0 and not (prompt and renders.upto(1)[0].startswith(prompt)):
        raise RowError(
            "assistant_first",
            "the first message is an answer, and the template has no prompt for that; put a message before it, or "
            "give it weight 0",
        )
    return prompt


def _start_of_answer(renders: Renders, turn: int, prompt: str) -> int:
    """Where the answer begins in the rendering that ends with it. Templates that end a tool's result otherwise while
    it is the last message render other texts before the answer than in the prompt; what opens an answer is the same.
    RowError if it is not."""
    through, before = renders.upto(turn + 1)[0], renders.upto(turn)[0]
    if through.startswith(prompt):
        return len(prompt)
    opening = prompt[len(os.path.commonprefix([prompt, before])) :]
    at = through.rfind(opening) if controls_of(renders.tokenizer).pattern.search(opening) else -1
    if at >= 0:
        return at + len(opening)
    if not through.startswith(before):
        raise RowError(
            "rewritten_prompt",
            f"message {turn}: the template renders the messages before it otherwise once it is there, so no server "
            "would feed what stands before it",
        )
    at = len(os.path.commonprefix([prompt, through]))
    raise RowError(
        "served_prompt",
        f"message {turn}: a server's prompt goes on with {prompt[at:][:40]!r}, and this answer's rendering with "
        f"{through[at:][:40]!r}; a variable of the template (pack.template_kwargs) may choose one of the two",
    )


def _end_of_turn(renders: Renders, turn: int, bounds: tuple[int, int], stops: Stops) -> int:
    """Where the turn is over: behind the token that ends it. `bounds`: where it begins, where its last text ends."""
    through, _ = renders.upto(turn + 1)
    start, told = bounds
    found = stops.behind(renders, turn + 1, told)
    if not found or found[-1][0] not in stops.strings:
        raise RowError(
            "no_stop",
            f"message {turn}: no token that stops generation is behind {through[:told][-40:]!r} (there is "
            f"{through[told:][:60]!r}), so the model would never stop. The chat template must end it with one that the "
            "tokenizer has: eos_token, or its own <|im_end|> and the like",
        )
    for stop in stops.strings:
        if through.find(stop, start, told) >= 0:
            raise RowError(
                "stops_early", f"message {turn}: {stop!r} ends an answer, and stands in the middle of this one"
            )
    return found[-1][1]


def _check_thought(message: dict[str, Any], turn: int, through: str, start: int) -> None:
    """A template may write an empty thought before one that it did not see, or its prompt may say not to think."""
    if not (message.get("reasoning_content") or thinks_inline(message)):
        return
    if EMPTY.match(through, start):
        raise RowError("lost_thought", f"message {turn}: the chat template writes an empty thought before its thought")
    if EMPTY.search(through, max(0, start - ENDING_CHARACTERS), start):
        raise RowError(
            "served_prompt", f"message {turn}: the prompt ends with an empty thought, and the answer has one"
        )


def _is_trained(message: dict[str, Any]) -> bool:
    weight = message.get("weight")
    return message["role"] == "assistant" and (weight is None or weight > 0)


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
