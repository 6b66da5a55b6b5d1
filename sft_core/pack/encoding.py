"""Messages to token ids and labels.

In: messages, a fast tokenizer, a chat template. Out: `Sequence`s. Ids equal `tokenizer.apply_chat_template(messages)`,
except that special tokens which somebody typed into a content stay text.

With the shipped `plain` template and a tokenizer of words (it is in tests/sft_core/test_pack.py),
`[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]` becomes

    ###   Human  :     hi    \\n    ###   Assistant  :     yes  </s>  \\n      the text, token by token
    3     4      6     7     2     3     5          6     8    1     2       input_ids
    -100  -100   -100  -100  -100  -100  -100       -100  8    1     -100    labels
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sft_core.errors import DataError
from sft_core.pack.controls import Controls, controls_of
from sft_core.pack.places import ByBytes, ByOffsets, Places, byte_lengths
from sft_core.pack.rendering import Rendering, TrainedSpan, render_conversation

IGNORE_INDEX = -100
"""Label of a token that is read but not trained; PyTorch's and HF's own."""


@dataclass(frozen=True, slots=True)
class Sequence:
    """Token ids and, position by position, the same ids where trained and IGNORE_INDEX elsewhere; the first always."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True, slots=True)
class Encoded:
    """Sequences laid end to end: number i is `starts[i]` to `starts[i + 1]` of `ids` and `labels`."""

    ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    starts: NDArray[np.int64]

    def sequence(self, number: int) -> Sequence:
        """Sequence `number`, on its own."""
        here = slice(*self.starts[number : number + 2])
        return Sequence(self.ids[here].tolist(), self.labels[here].tolist())


def encode_messages(messages: SequenceOf[dict[str, Any]], tokenizer: Any, chat_template: str) -> Sequence:
    """The one sequence of a conversation. DataError if the template makes more of it."""
    sequences = encode_conversation(messages, tokenizer, chat_template)
    if len(sequences) != 1:
        raise DataError(
            f"the chat template rewrites earlier turns, so this conversation of {len(messages)} messages makes "
            f"{len(sequences)} sequences, not one; use encode_conversation"
        )
    return sequences[0]


def encode_conversation(
    messages: SequenceOf[dict[str, Any]],
    tokenizer: Any,
    chat_template: str,
    tools: SequenceOf[dict[str, Any]] | None = None,
) -> list[Sequence]:
    """Sequences in which every trained turn is trained once: one, unless the template rewrites earlier turns."""
    return encode_renderings(render_conversation(messages, tokenizer, chat_template, tools=tools), tokenizer)


def encode_renderings(renderings: SequenceOf[Rendering], tokenizer: Any) -> list[Sequence]:
    """One sequence a rendering, in order."""
    encoded = label_tokens(renderings, tokenize(renderings, tokenizer), tokenizer)
    return [encoded.sequence(number) for number in range(len(renderings))]


def tokenize(renderings: SequenceOf[Rendering], tokenizer: Any) -> list[Any]:
    """A tokenizers.Encoding a rendering. Nearly all of it is Rust on all cores, without Python's lock."""
    controls = controls_of(tokenizer)
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    encode = backend.encode_batch if byte_lengths(tokenizer) is None else backend.encode_batch_fast  # no offsets
    ordinary = [rendering.text for rendering in renderings if not rendering.typed]
    encoded = iter(encode(ordinary, add_special_tokens=False) if ordinary else ())
    return [controls.encoding_of_cloaked(r.text) if r.typed else next(encoded) for r in renderings]


def label_tokens(renderings: SequenceOf[Rendering], encodings: SequenceOf[Any], tokenizer: Any) -> Encoded:
    """Ids and labels of what `tokenize` made of `renderings`."""
    controls = controls_of(tokenizer)
    bos = tokenizer.bos_token_id  # looked up once: HF's attributes are slow
    pairs = list(zip(renderings, encodings, strict=True))
    texts = [controls.ids_of_cloaked(encoding) if r.typed else encoding.ids for r, encoding in pairs]
    starts = np.zeros(len(texts) + 1, np.int64)
    np.cumsum([len(ids) for ids in texts], out=starts[1:])
    ids = np.fromiter(chain.from_iterable(texts), np.int32, count=starts[-1])
    labels = np.full(len(ids), IGNORE_INDEX, np.int32)
    lengths = byte_lengths(tokenizer)
    borders = None if lengths is None else np.concatenate([[0], np.cumsum(lengths[ids])])
    for number, (rendering, encoding) in enumerate(pairs):
        start, end = starts[number : number + 2].tolist()
        if bos is not None and texts[number][:2] == [bos] * 2:
            raise DataError(
                f"{tokenizer.name_or_path}: a sequence starts with {tokenizer.bos_token!r} twice; "
                "drop bos_token from the chat template, or the tokenizer's own habit of adding it"
            )
        places: Places = ByOffsets(encoding)
        if borders is not None and not rendering.typed:
            places = _places(rendering.text, borders[start : end + 1], tokenizer)
        for span in rendering.spans:
            first, last = _trained_tokens(texts[number], places, span, controls)
            first = max(first, 1)  # what comes first is never trained: nothing predicts it
            labels[start + first : start + last] = ids[start + first : start + last]
    return Encoded(ids, labels, starts)


def _places(text: str, borders: NDArray[np.int64], tokenizer: Any) -> Places:
    by_bytes = ByBytes(text, borders)
    if by_bytes.fits():
        return by_bytes
    return ByOffsets(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False))


def _trained_tokens(ids: list[int], places: Places, span: TrainedSpan, controls: Controls) -> tuple[int, int]:
    """A token is trained if it holds a character of a span. A control token that only reaches into it is not."""
    first, last = places.span(span.start, span.end)
    while first < last and ids[first] in controls.id_set and places.begins_before(first, span.start):
        first += 1  # `<|assistant|>` of Phi-3 takes the white space after it along
    return first, last
