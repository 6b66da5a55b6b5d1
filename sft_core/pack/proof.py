"""Proof on some conversations, before all are encoded: the tokenizer as saved reads them as the one in use does; and
what the chat template does to a whole kind of row is said once, early, with what would help.

In: conversations, the tokenizer as it came, and the tokenizer as saved. Out: lines to say, or a DataError that names
the row: ids that the saved tokenizer with its chat template does not reproduce. What every row has to pass is in
`rendering` and `encoding`; two BOS in a row are refused by the encoding itself.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from itertools import chain, islice
from typing import Any

from sft_core.errors import DataError, RowError
from sft_core.pack.chat_templates import shipped_templates
from sft_core.pack.encoding import Sequence, encode_renderings, encode_rows
from sft_core.pack.rendering import Rendering, render_conversation
from sft_core.pack.renders import in_form, plain_message, tools_of
from sft_core.pack.template import DROP_REASONING, bind_template, drops_reasoning, strftime_fixed
from sft_core.pack.wanted import wanted_of

PROVED_CONVERSATIONS = 20
ROWS_LOOKED_AT = 1_000
"""The chat template may refuse some."""
CONTROL = re.compile(r"<[|｜][^<>{}']+[|｜]>")
SWITCHES = ("enable_thinking", "thinking", "open_thinking")
"""Variables by which templates choose how an answer begins; Qwen's and GLM's, DeepSeek's and Granite's, minimind's."""


def prove_rows(
    rows: Iterable[dict[str, Any]], tokenizer: Any, saved: Any, chat_template: str, *, all_new: bool = True
) -> list[str]:
    """Check the first of these conversations that the template takes. Few, whatever the data's size. A line for every
    reason for which some were refused. DataError if it takes none, unless others, that are not looked at, were taken
    before (`all_new` is false)."""
    proved, looked_at = 0, 0
    refused: Counter[str] = Counter()
    first: dict[str, tuple[dict[str, Any], RowError]] = {}
    for row in islice(rows, ROWS_LOOKED_AT):
        looked_at += 1
        try:
            renderings = render_conversation(row["messages"], tokenizer, chat_template, tools=tools_of(row))
            made = encode_rows([renderings], tokenizer)
            if isinstance(made.counts[0], RowError):
                raise made.counts[0]
        except RowError as error:
            refused[error.reason] += 1
            first.setdefault(error.reason, (row, error))
            continue
        sequences = [made.encoded.sequence(number) for number in range(made.counts[0])]
        prove_row(row, made.renderings, sequences, saved)
        proved += 1
        if proved == PROVED_CONVERSATIONS:
            break
    lines = []
    for reason, _ in refused.most_common():
        row, why = first[reason]
        what = f"{_place(row)}: {why.detail}{_remedy(row, tokenizer, chat_template)}"
        if looked_at == refused.total() and all_new:
            raise DataError(f"the chat template takes none of the conversations; {reason}: {what}")
        lines.append(f"rows are set aside by the chat template; {reason}: {what}")
    return lines


def _remedy(row: dict[str, Any], tokenizer: Any, chat_template: str) -> str:
    """What would render this row."""
    for words, changed in chain(_changes(chat_template), _shipped(tokenizer)):
        try:
            encode_renderings(render_conversation(row["messages"], tokenizer, changed, tools_of(row)), tokenizer)
        except (RowError, DataError):
            continue
        return f". With {words} it is rendered"
    return "; another pack.chat_template may render it"


def _changes(chat_template: str) -> Iterator[tuple[str, str]]:
    """Templates to try: the values of the variables by which it chooses how an answer begins, and no thoughts."""
    drop = [] if drops_reasoning(chat_template) else [("pack.reasoning: drop", {DROP_REASONING: True})]
    chosen = [
        (f"pack.template_kwargs: {{{name}: {str(value).lower()}}}", {name: value})
        for name in SWITCHES
        if name in chat_template
        for value in (False, True)
    ]
    both = [(f"{a} and {b}", {**x, **y}) for a, x in chosen for b, y in drop]
    yield from ((words, bind_template(chat_template, values)) for words, values in (*chosen, *drop, *both))


def _shipped(tokenizer: Any) -> Iterator[tuple[str, str]]:
    """Shipped templates whose control tokens are all the tokenizer's."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    for name, text in shipped_templates().items():
        controls = set(CONTROL.findall(text))
        if controls and controls <= added:
            yield f"pack.chat_template: {name}", text


def prove_row(
    row: dict[str, Any], renderings: SequenceOf[Rendering], sequences: SequenceOf[Sequence], saved: Any
) -> None:
    """Check the encoding of one conversation against `saved`, the tokenizer as it will be loaded for serving."""
    where = _place(row)
    talk = wanted_of(row["messages"], saved.chat_template)
    for rendering, sequence in zip(renderings, sequences, strict=True):
        if rendering.typed or talk[0]["role"] == "text":
            continue
        prompted = rendering.composed or rendering.parted is not None  # a server's text as far as its prompt goes
        messages = [plain_message(message, None) for message in talk[: rendering.messages - prompted]]
        encoded = saved.apply_chat_template(
            in_form(messages, rendering.form),
            tools=tools_of(row),
            add_generation_prompt=prompted,
            return_dict=True,
            tokenizer_kwargs={"verbose": False},
            strftime_now=strftime_fixed,
        )
        served = encoded["input_ids"]
        trained = sequence.input_ids[: len(served)] if prompted else sequence.input_ids
        if served != trained:
            raise DataError(f"{where}: {_difference(trained, served, saved)}")


def _place(row: dict[str, Any]) -> str:
    return f"{row['dataset']}, {row['file']}, row {row['row_number']}"


def _difference(trained: list[int], served: list[int], saved: Any) -> str:
    at = next(
        (i for i, (a, b) in enumerate(zip(trained, served, strict=False)) if a != b), min(len(trained), len(served))
    )
    return (
        f"training would see other tokens than serving: from token {at} on {saved.decode(trained[at : at + 8])!r} "
        f"({trained[at : at + 8]}) against {saved.decode(served[at : at + 8])!r} ({served[at : at + 8]}). The "
        "tokenizer changes when saved and loaded again; check its files, or set another pack.chat_template"
    )
