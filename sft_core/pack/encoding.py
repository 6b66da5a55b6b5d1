"""Messages to token ids and labels.

In: messages, a fast tokenizer, a chat template. Out: `Sequence`s. Ids equal `tokenizer.apply_chat_template(messages)`,
except that special tokens which somebody typed into a content stay text.

With the shipped `plain` template and a tokenizer of words (it is in tests/sft_core/test_pack.py),
`[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]` becomes

    ###   Human  :     hi    \\n    ###   Assistant  :     yes  </s>  \\n      the text, token by token
    3     4      6     7     2     3     5          6     8    1     2       input_ids
    -100  -100   -100  -100  -100  -100  -100       -100  8    1     -100    labels
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any

from sft_core.errors import DataError
from sft_core.pack.controls import Controls, controls_of
from sft_core.pack.rendering import Rendering, TrainedSpan, render_conversation

IGNORE_INDEX = -100
"""Label of a token that is read but not trained; PyTorch's and HF's own."""


@dataclass(frozen=True, slots=True)
class Sequence:
    """Token ids and, position by position, the same ids where trained and IGNORE_INDEX elsewhere; the first always."""

    input_ids: list[int]
    labels: list[int]


def encode_messages(messages: SequenceOf[dict[str, Any]], tokenizer: Any, chat_template: str) -> Sequence:
    """The one sequence of a conversation. DataError if the template makes more of it."""
    sequences = encode_conversation(messages, tokenizer, chat_template)
    if len(sequences) != 1:
        raise DataError(
            f"the chat template rewrites earlier turns, so this conversation of {len(messages)} messages makes "
            f"{len(sequences)} sequences, not one; use encode_conversation"
        )
    return sequences[0]


def encode_conversation(messages: SequenceOf[dict[str, Any]], tokenizer: Any, chat_template: str) -> list[Sequence]:
    """Sequences in which every trained turn is trained once: one, unless the template rewrites earlier turns."""
    return encode_renderings(render_conversation(messages, tokenizer, chat_template), tokenizer)


def encode_renderings(renderings: SequenceOf[Rendering], tokenizer: Any) -> list[Sequence]:
    """One sequence a rendering, in order. Many at once are quicker."""
    controls = controls_of(tokenizer)
    ordinary = [rendering.text for rendering in renderings if not rendering.typed]
    encoded = iter(_encode_ordinary(ordinary, tokenizer))
    sequences = []
    for rendering in renderings:
        ids, offsets = controls.encode_cloaked(rendering.text) if rendering.typed else next(encoded)
        if tokenizer.bos_token_id is not None and ids[:2] == [tokenizer.bos_token_id] * 2:
            raise DataError(
                f"{tokenizer.name_or_path}: a sequence starts with {tokenizer.bos_token!r} twice; "
                "drop bos_token from the chat template, or the tokenizer's own habit of adding it"
            )
        sequences.append(Sequence(ids, _labels(ids, offsets, rendering.spans, controls)))
    return sequences


def _encode_ordinary(texts: list[str], tokenizer: Any) -> list[tuple[list[int], list[tuple[int, int]]]]:
    if not texts:
        return []
    encoded = tokenizer(
        texts, add_special_tokens=False, return_attention_mask=False, return_offsets_mapping=True, verbose=False
    )
    return list(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))


def _labels(
    ids: list[int], offsets: list[tuple[int, int]], spans: SequenceOf[TrainedSpan], controls: Controls
) -> list[int]:
    """A token is trained if it holds a character of a span. A control token that only reaches into it is not."""
    labels = [IGNORE_INDEX] * len(ids)
    for span in spans:
        first = bisect_right(offsets, span.start, key=lambda offset: offset[1])
        last = bisect_left(offsets, span.end, key=lambda offset: offset[0])
        while first < last and offsets[first][0] < span.start and ids[first] in controls.id_set:
            first += 1  # `<|assistant|>` of Phi-3 takes the white space after it along
        labels[first:last] = ids[first:last]
    if labels:
        labels[0] = IGNORE_INDEX
    return labels
