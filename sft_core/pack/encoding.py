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
from sft_core.pack.controls import controls_of
from sft_core.pack.places import ByBytes, ByOffsets, Numbers, byte_lengths, bytes_before
from sft_core.pack.rendering import Rendering, render_conversation

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
    if backend.truncation is not None or backend.padding is not None:  # to set them waits for other threads' batches
        backend.no_truncation()
        backend.no_padding()
    encode = backend.encode_batch if byte_lengths(tokenizer) is None else backend.encode_batch_fast  # no offsets
    ordinary = [rendering.text for rendering in renderings if not rendering.typed]
    encoded = iter(encode(ordinary, add_special_tokens=False) if ordinary else ())
    return [controls.encoding_of_cloaked(r.text) if r.typed else next(encoded) for r in renderings]


def label_tokens(renderings: SequenceOf[Rendering], encodings: SequenceOf[Any], tokenizer: Any) -> Encoded:
    """Ids and labels of what `tokenize` made of `renderings`."""
    controls = controls_of(tokenizer)
    pairs = zip(renderings, encodings, strict=True)
    texts = [controls.ids_of_cloaked(encoding) if r.typed else encoding.ids for r, encoding in pairs]
    starts = np.zeros(len(texts) + 1, np.int64)
    np.cumsum([len(ids) for ids in texts], out=starts[1:])
    ids = np.fromiter(chain.from_iterable(texts), np.int32, count=starts[-1])
    _refuse_two_bos(texts, tokenizer)
    owners, firsts, lasts = _trained_tokens(renderings, encodings, ids, starts, tokenizer).T
    firsts = np.maximum(firsts, starts[owners] + 1)  # what comes first is never trained: nothing predicts it
    held = firsts < lasts
    edges = np.zeros(len(ids) + 1, np.int32)  # their running sum is above 0 inside of spans
    np.add.at(edges, firsts[held], 1)
    np.add.at(edges, lasts[held], -1)
    return Encoded(ids, np.where(np.cumsum(edges[:-1]) > 0, ids, np.int32(IGNORE_INDEX)), starts)


def _refuse_two_bos(texts: SequenceOf[list[int]], tokenizer: Any) -> None:
    bos = tokenizer.bos_token_id
    if bos is not None and any(ids[:2] == [bos, bos] for ids in texts):
        raise DataError(
            f"{tokenizer.name_or_path}: a sequence starts with {tokenizer.bos_token!r} twice; "
            "drop bos_token from the chat template, or the tokenizer's own habit of adding it"
        )


def _trained_tokens(
    renderings: SequenceOf[Rendering],
    encodings: SequenceOf[Any],
    ids: NDArray[np.int32],
    starts: NDArray[np.int64],
    tokenizer: Any,
) -> Numbers:
    """Whose it is, first token and the one past the last of every trained span, as rows; tokens count over all texts.

    A token is trained if it holds a character of a span. A control token that only reaches into it is not:
    `<|assistant|>` of Phi-3 takes the white space after it along.
    """
    lengths, special = byte_lengths(tokenizer), controls_of(tokenizer).id_set
    counted = None if lengths is None else ByBytes.of([r.text for r in renderings], ids, starts, lengths)
    by_bytes: list[tuple[int, int, int]] = []
    found: list[tuple[int, int, int]] = []
    for number, (rendering, encoding) in enumerate(zip(renderings, encodings, strict=True)):
        if counted is not None and not rendering.typed:
            if counted.fits[number]:
                text, zero = rendering.text, counted.zeros[number]
                for span in rendering.spans:
                    by_bytes.append(
                        (number, zero + bytes_before(text, span.start), zero + bytes_before(text, span.end))
                    )
                continue
            encoding = tokenizer.backend_tokenizer.encode(rendering.text, add_special_tokens=False)  # with offsets
        places, zero = ByOffsets(encoding), int(starts[number])
        for span in rendering.spans:
            first, last = places.span(span.start, span.end)
            while first < last and int(ids[zero + first]) in special and places.begins_before(first, span.start):
                first += 1
            found.append((number, zero + first, zero + last))
    rows = [np.array(found, np.int64).reshape(-1, 3)]
    if counted is not None and by_bytes:
        owners, begins, ends = np.array(by_bytes, np.int64).T
        firsts, lasts = counted.spans(begins, ends)
        reaching = np.arange(len(owners))
        while len(reaching):
            at = firsts[reaching]
            into = (at < lasts[reaching]) & (counted.borders[at] < begins[reaching])
            reaching = reaching[into & np.isin(ids.take(at, mode="clip"), list(special))]
            firsts[reaching] += 1
        rows.append(np.stack([owners, firsts, lasts], axis=1))
    return np.concatenate(rows)
