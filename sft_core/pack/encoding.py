"""Messages to token ids and labels.

In: messages, a fast tokenizer, a chat template. Out: `Sequence`s. Ids equal `tokenizer.apply_chat_template(messages)`,
except that special tokens which somebody typed into a content stay text; and that a turn whose first characters would
merge with the last token of its prompt (a line break behind `assistant\\n`, where a tokenizer has a token for two) gets
a sequence of its own, in which the prompt's ids are those that a server feeds, and the answer's follow them.

With the shipped `plain` template and a tokenizer of words (it is in tests/sft_core/test_pack.py),
`[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]` becomes

    ###   Human  :     hi    \\n    ###   Assistant  :     yes  </s>  \\n      the text, token by token
    3     4      6     7     2     3     5          6     8    1     2       input_ids
    -100  -100   -100  -100  -100  -100  -100       -100  8    1     -100    labels
"""

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from itertools import chain
from types import MappingProxyType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from sft_core.errors import DataError, RowError
from sft_core.pack.controls import controls_of
from sft_core.pack.places import ByBytes, ByOffsets, Numbers, byte_lengths, bytes_before
from sft_core.pack.rendering import Rendering, TrainedSpan, render_conversation
from sft_core.pack.template import bind_template

KNOWN_CHARACTERS = 64
"""Ends of prompts up to so long are tokenised once."""
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


def encode_messages(
    messages: SequenceOf[dict[str, Any]],
    tokenizer: Any,
    chat_template: str,
    template_kwargs: Mapping[str, Any] = MappingProxyType({}),
) -> Sequence:
    """The one sequence of a conversation. DataError if the template makes more of it."""
    sequences = encode_conversation(messages, tokenizer, chat_template, template_kwargs=template_kwargs)
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
    template_kwargs: Mapping[str, Any] = MappingProxyType({}),
) -> list[Sequence]:
    """Sequences in which every trained turn is trained once: one, unless the template rewrites earlier turns. RowError
    where something else would be trained than the messages say, or behind another prompt than a server feeds.

    `tools`: JSON schemas of the functions that may be called. `template_kwargs`: variables of the template.
    """
    bound = bind_template(chat_template, template_kwargs)
    return encode_renderings(render_conversation(messages, tokenizer, bound, tools=tools), tokenizer)


def encode_renderings(renderings: SequenceOf[Rendering], tokenizer: Any) -> list[Sequence]:
    """The sequences of one conversation, in order: one a rendering, unless an answer merges with its prompt."""
    made = encode_rows([renderings], tokenizer)
    (count,) = made.counts
    if isinstance(count, RowError):
        raise count
    return [made.encoded.sequence(number) for number in range(count)]


@dataclass(frozen=True, slots=True)
class EncodedRows:
    """All sequences of some rows, row by row. `counts`: how many of each row, or why there is none. `renderings`: of
    each sequence."""

    counts: list[int | RowError]
    encoded: Encoded
    renderings: SequenceOf[Rendering]

    @property
    def parted_turns(self) -> int:
        """Answers that were tokenised apart from their prompts."""
        return sum(rendering.parted is not None for rendering in self.renderings)


def encode_rows(rows: SequenceOf[SequenceOf[Rendering]], tokenizer: Any) -> EncodedRows:
    """Tokenise and label the renderings of some rows."""
    flat = [rendering for row in rows for rendering in row]
    encodings = tokenize(flat, tokenizer)
    encoded, merging = label_tokens(flat, encodings, tokenizer)
    if not merging:
        return EncodedRows([len(row) for row in rows], encoded, flat)
    counts, kept, numbers = list[int | RowError](), list[tuple[Rendering, Any]](), iter(range(len(flat)))
    for row in rows:
        numbered = [(next(numbers), rendering) for rendering in row]
        try:
            parted = [
                pair
                for number, rendering in numbered
                for pair in _parted(rendering, encodings[number], merging.get(number, set()), tokenizer)
            ]
        except RowError as error:
            counts.append(error)
        else:
            counts.append(len(parted))
            kept += parted
    renderings, of_them = [rendering for rendering, _ in kept], [encoding for _, encoding in kept]
    return EncodedRows(counts, label_tokens(renderings, of_them, tokenizer)[0], renderings)


def _parted(
    rendering: Rendering, encoding: Any, merging: set[TrainedSpan], tokenizer: Any
) -> list[tuple[Rendering, Any]]:
    """The turns that merge with their prompts, each apart, and the rendering with the others. RowError where an answer
    has other tokens on its own, as tokenizers give it that do not spell bytes."""
    if merging and byte_lengths(tokenizer) is None:
        raise RowError(
            "merges_with_prompt",
            f"message {min(span.turn for span in merging)}: the tokenizer joins its beginning with the last token of "
            "the prompt, which no server would feed; begin answers without white space",
        )
    rest = tuple(span for span in rendering.spans if span not in merging)
    alone = [
        replace(rendering, text=rendering.text[: span.end], spans=(span,), messages=span.turn + 1, parted=span.start)
        for span in rendering.spans
        if span in merging
    ]
    pairs = list(zip(alone, tokenize(alone, tokenizer), strict=True))
    if rest or not pairs:
        pairs.append((replace(rendering, spans=rest), encoding))
    return sorted(pairs, key=lambda pair: pair[0].spans[-1].turn if pair[0].spans else -1)


def tokenize(renderings: SequenceOf[Rendering], tokenizer: Any) -> list[Any]:
    """A tokenizers.Encoding a rendering. Nearly all of it is Rust on all cores, without Python's lock."""
    controls = controls_of(tokenizer)
    backend = tokenizer.backend_tokenizer
    if backend.truncation is not None or backend.padding is not None:  # to set them waits for other threads' batches
        backend.no_truncation()
        backend.no_padding()
    encode = backend.encode_batch if byte_lengths(tokenizer) is None else backend.encode_batch_fast  # no offsets
    ordinary = [rendering.text for rendering in renderings if not rendering.typed and rendering.parted is None]
    encoded = iter(encode(ordinary, add_special_tokens=False) if ordinary else ())
    return [
        Parted.of(rendering, tokenizer)
        if rendering.parted is not None
        else controls.encoding_of_cloaked(rendering.text)
        if rendering.typed
        else next(encoded)
        for rendering in renderings
    ]


@dataclass(frozen=True, slots=True)
class Parted:
    """Ids of a prompt and of the answer behind it, which begins at `first`."""

    ids: list[int]
    first: int

    @classmethod
    def of(cls, rendering: Rendering, tokenizer: Any) -> Self:
        """Both tokenised apart."""
        at = rendering.parted
        prompt, answer = (
            ids_of(text, rendering.typed, tokenizer) for text in (rendering.text[:at], rendering.text[at:])
        )
        return cls([*prompt, *answer], len(prompt))


def ids_of(text: str, typed: bool, tokenizer: Any) -> list[int]:
    """Ids of a rendering's text, or of a part of it."""
    controls = controls_of(tokenizer)
    if typed:
        return controls.ids_of_cloaked(controls.encoding_of_cloaked(text))
    ids: list[int] = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    return ids


Merging = dict[int, set[TrainedSpan]]
"""By a rendering's number, the spans of it whose prompts have other ids in the whole text than alone."""


def label_tokens(
    renderings: SequenceOf[Rendering], encodings: SequenceOf[Any], tokenizer: Any
) -> tuple[Encoded, Merging]:
    """Ids and labels of what `tokenize` made of `renderings`, and the spans that merge with their prompts."""
    controls = controls_of(tokenizer)
    pairs = zip(renderings, encodings, strict=True)
    texts = [
        controls.ids_of_cloaked(encoding) if r.typed and r.parted is None else encoding.ids for r, encoding in pairs
    ]
    starts = np.zeros(len(texts) + 1, np.int64)
    np.cumsum([len(ids) for ids in texts], out=starts[1:])
    ids = np.fromiter(chain.from_iterable(texts), np.int32, count=starts[-1])
    _refuse_two_bos(texts, tokenizer)
    spans, places = _trained_tokens(renderings, encodings, ids, starts, tokenizer)
    owners, firsts, lasts = places.T
    prompts = Prompts(tokenizer)
    merging: Merging = {}
    for (number, span), first in zip(spans, firsts.tolist(), strict=True):
        rendering = renderings[number]
        if rendering.parted is None and not prompts.end_at(rendering, span, ids, (starts[number], first)):
            merging.setdefault(number, set()).add(span)
    firsts = np.maximum(firsts, starts[owners] + 1)  # what comes first is never trained: nothing predicts it
    held = firsts < lasts
    edges = np.zeros(len(ids) + 1, np.int32)  # their running sum is above 0 inside of spans
    np.add.at(edges, firsts[held], 1)
    np.add.at(edges, lasts[held], -1)
    return Encoded(ids, np.where(np.cumsum(edges[:-1]) > 0, ids, np.int32(IGNORE_INDEX)), starts), merging


class Prompts:
    """Whether a prompt's ids are the same at the head of a longer text as alone, which is how a server feeds it. Added
    tokens part a text, so what stands behind the last of them decides."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._controls = tokenizer, controls_of(tokenizer)
        self._known: dict[tuple[str, bool], list[int]] = {}

    def end_at(self, rendering: Rendering, span: TrainedSpan, ids: NDArray[np.int32], bounds: tuple[int, int]) -> bool:
        """Whether the prompt of `span` is the tokens of `ids` within `bounds`."""
        begin, first = bounds
        tail = rendering.text[self._last_control(rendering.text, span.start) : span.start]
        if not tail:
            return True
        key = (tail, rendering.typed)
        alone = self._known.get(key)
        if alone is None:
            alone = ids_of(tail, rendering.typed, self._tokenizer)
            if len(tail) < KNOWN_CHARACTERS:
                self._known[key] = alone
        return first - len(alone) >= begin and ids[first - len(alone) : first].tolist() == alone

    def _last_control(self, text: str, end: int) -> int:
        """Where the last special token before `end` begins; 0 if there is none."""
        for begin in (max(0, end - KNOWN_CHARACTERS), 0):
            found = [match.start() for match in self._controls.pattern.finditer(text, begin, end)]
            if found:
                return found[-1]
        return 0


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
) -> tuple[list[tuple[int, TrainedSpan]], Numbers]:
    """Every trained span with its rendering's number; and whose it is, first token and the one past the last, as rows;
    tokens count over all texts.

    A token is trained if it holds a character of a span. A control token that only reaches into it is not:
    `<|assistant|>` of Phi-3 takes the white space after it along.
    """
    lengths, special = byte_lengths(tokenizer), controls_of(tokenizer).id_set
    counted = None if lengths is None else ByBytes.of([r.text for r in renderings], ids, starts, lengths)
    by_bytes: list[tuple[int, int, int]] = []
    found: list[tuple[int, int, int]] = []
    of_bytes, of_found = list[tuple[int, TrainedSpan]](), list[tuple[int, TrainedSpan]]()
    for number, (rendering, encoding) in enumerate(zip(renderings, encodings, strict=True)):
        if rendering.parted is not None:
            found.append((number, int(starts[number]) + encoding.first, int(starts[number + 1])))
            of_found.append((number, rendering.spans[0]))
            continue
        if counted is not None and not rendering.typed:
            if counted.fits[number]:
                of_bytes += [(number, span) for span in rendering.spans]
                text, zero = rendering.text, counted.zeros[number]
                for span in rendering.spans:
                    by_bytes.append(
                        (number, zero + bytes_before(text, span.start), zero + bytes_before(text, span.end))
                    )
                continue
            encoding = tokenizer.backend_tokenizer.encode(rendering.text, add_special_tokens=False)  # with offsets
        places, zero = ByOffsets(encoding), int(starts[number])
        of_found += [(number, span) for span in rendering.spans]
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
    return of_found + of_bytes, np.concatenate(rows)
