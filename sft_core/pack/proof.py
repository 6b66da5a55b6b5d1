"""Proof on some conversations, before anything is trained: what is trained is what will be served.

In: conversations, the tokenizer as it came, and the tokenizer as saved. Out: nothing, or a DataError that names the
row: an answer whose end token is not trained (the model would never stop), or ids that the saved tokenizer with its
chat template does not reproduce. Two BOS in a row are refused by the encoding itself.
"""

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from itertools import islice
from typing import Any

from sft_core.errors import DataError, RowError
from sft_core.pack.controls import controls_of
from sft_core.pack.encoding import Sequence, encode_renderings
from sft_core.pack.rendering import Rendering, plain_message, render_conversation, tools_of

PROVED_CONVERSATIONS = 20
ROWS_LOOKED_AT = 1_000
"""The chat template may refuse some."""


def prove_rows(rows: Iterable[dict[str, Any]], tokenizer: Any, saved: Any, chat_template: str) -> int:
    """Check the first of these conversations that the template takes; how many there were. Few, whatever the data's
    size."""
    proved = 0
    for row in islice(rows, ROWS_LOOKED_AT):
        try:
            renderings = render_conversation(row["messages"], tokenizer, chat_template, tools=tools_of(row))
        except RowError:
            continue
        prove_row(row, renderings, encode_renderings(renderings, tokenizer), saved)
        proved += 1
        if proved == PROVED_CONVERSATIONS:
            break
    return proved


def prove_row(
    row: dict[str, Any], renderings: SequenceOf[Rendering], sequences: SequenceOf[Sequence], saved: Any
) -> None:
    """Check the encoding of one conversation against `saved`, the tokenizer as it will be loaded for serving."""
    where = f"{row['dataset']}, {row['file']}, row {row['row_number']}"
    for rendering, sequence in zip(renderings, sequences, strict=True):
        for turn in {span.turn: span for span in rendering.spans}.values():
            answer = row["messages"][turn.turn]["content"] or ""
            _prove_end(where, rendering.text[turn.start : turn.end], answer, saved)
        if not rendering.typed and row["messages"][0]["role"] != "text":
            messages = [plain_message(message, None) for message in row["messages"][: rendering.messages]]
            encoded = saved.apply_chat_template(
                messages, tools=tools_of(row), return_dict=True, tokenizer_kwargs={"verbose": False}
            )
            served = encoded["input_ids"]
            if served != sequence.input_ids:
                raise DataError(f"{where}: {_difference(sequence.input_ids, served, saved)}")


def _prove_end(where: str, trained: str, answer: str, saved: Any) -> None:
    if not trained.endswith(controls_of(saved).ends):
        raise DataError(
            f"{where}: no end token is trained after the answer {answer[-40:]!r} (trained: {trained[-60:]!r}), so the "
            "model would never stop. The chat template must end it, inside {% generation %} marks if it has them, with "
            "a token that the tokenizer has: eos_token, or its own <|im_end|> and the like. Else set another "
            "pack.chat_template; `plain` needs eos_token only"
        )


def _difference(trained: list[int], served: list[int], saved: Any) -> str:
    at = next(
        (i for i, (a, b) in enumerate(zip(trained, served, strict=False)) if a != b), min(len(trained), len(served))
    )
    return (
        f"training would see other tokens than serving: from token {at} on {saved.decode(trained[at : at + 8])!r} "
        f"({trained[at : at + 8]}) against {saved.decode(served[at : at + 8])!r} ({served[at : at + 8]}). The "
        "tokenizer changes when saved and loaded again; check its files, or set another pack.chat_template"
    )
