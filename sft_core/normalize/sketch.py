"""Small signatures of conversations, by which near duplicates are found without reading a text again.

In: messages. Out: a signature of BINS bytes a conversation; the share of equal bytes estimates the Jaccard similarity
of the texts' character n-grams (standard deviation about 0.03 at 0.8).

One-permutation MinHash (Li, Owen & Zhang, NIPS 2012) with the low 8 bits of each bin's least hash (Li & König, WWW
2010); an empty bin takes the value of one that is not, each bin trying the others in an order of its own (Shrivastava,
ICML 2017). Roles, system prompts and tools are left out, as many conversations share them. So are thoughts: a question
and its answer are held out or trained, however differently a model thought in between. Letters' case and form (NFKC)
and white space do not count. A text of fewer than SHORT n-grams is one gram: near it is only what equals it.
"""

import hashlib
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from itertools import compress

import numpy as np
from numpy.typing import NDArray

from sft_core.normalize.conversation import Message

GRAM, SHORT, BINS = 5, 48, 128
MOST_CHARACTERS = 1_000_000
"""Of one text; what comes behind does not count."""
BLOCK_CHARACTERS = 1 << 17
"""Characters hashed at a time: the arrays stay in the processor's cache."""
PARAMETERS = {"gram": GRAM, "short": SHORT, "bins": BINS, "characters": MOST_CHARACTERS}
"""What decides a signature beside the text."""
MARKS = {ord(mark): " " for mark in ",.!?;:"} | {ord(mark): None for mark in "，。！？；：、"}
"""Marks between words. Chinese has no space beside them."""
BASE = np.uint32(0x9E3779B1)
MIX = ((np.uint32(16), np.uint32(0x85EBCA6B)), (np.uint32(13), np.uint32(0xC2B2AE35)))
BIN_SHIFT = np.uint32(32 - 7)
EMPTY = np.uint32(0xFFFFFFFF)
PROBES = np.random.default_rng(0).permuted(np.tile(np.arange(BINS), (BINS, 1)), axis=1).T
"""(attempt, bin): the bin that an empty one looks at; each looks at all in the end."""

Signatures = NDArray[np.uint8]
"""Shape (conversations, BINS)."""


def text_of(messages: Sequence[Message]) -> str:
    """The text that is compared.

    >>> text_of([{"role": "user", "content": "Ｈi  There", "weight": None}])
    'hi there'
    """
    parts = [part for m in messages if m["role"] != "system" for part in (m["content"], m.get("tool_calls")) if part]
    text = "\n".join(parts)[:MOST_CHARACTERS]
    plain = text.translate(MARKS)
    return " ".join((plain if plain.isascii() else unicodedata.normalize("NFKC", plain)).casefold().split())


def sketch(texts: Iterable[str]) -> Signatures:
    """Signatures of texts made by `text_of`."""
    blocks = [_sketch_block(block) for block in _blocks(texts)]
    return np.concatenate(blocks) if blocks else np.zeros((0, BINS), np.uint8)


def similarity(equal_bins: NDArray[np.integer]) -> NDArray[np.float64]:
    """Estimated Jaccard similarity of two signatures with so many equal bytes; chance makes 1 in 256 of the rest so.

    >>> similarity(np.array([0, BINS])).tolist()
    [0.0, 1.0]
    """
    return np.maximum((equal_bins / BINS - 1 / 256) / (1 - 1 / 256), 0)


def _blocks(texts: Iterable[str]) -> Iterator[list[str]]:
    """Texts in order, BLOCK_CHARACTERS or a little more at a time."""
    block: list[str] = []
    size = 0
    for text in texts:
        block.append(text)
        size += len(text)
        if size >= BLOCK_CHARACTERS:
            yield block
            block, size = [], 0
    if block:
        yield block


def _sketch_block(texts: list[str]) -> Signatures:
    signatures = np.empty((len(texts), BINS), np.uint8)
    long = [len(text) >= SHORT + GRAM - 1 for text in texts]
    for row, text in enumerate(texts):
        if not long[row]:
            signatures[row] = np.frombuffer(hashlib.shake_128(text.encode("utf-8")).digest(BINS), np.uint8)
    if any(long):
        signatures[long] = _min_hashes(list(compress(texts, long)))
    return signatures


def _min_hashes(texts: list[str]) -> Signatures:
    """Of texts of at least one n-gram."""
    lengths = np.fromiter(map(len, texts), np.int64, len(texts))
    hashes = _gram_hashes("".join(texts))
    borders = np.cumsum(lengths)[:-1]
    for back in range(1, GRAM):  # n-grams that span two texts
        hashes[borders - back] = EMPTY
    bins = np.repeat(np.arange(0, len(texts) * BINS, BINS), lengths)[: len(hashes)]
    bins += hashes >> BIN_SHIFT
    least = np.full(len(texts) * BINS, EMPTY)
    np.minimum.at(least, bins, hashes)
    return _filled(least.reshape(-1, BINS))


def _gram_hashes(text: str) -> NDArray[np.uint32]:
    """A hash of every n-gram, (characters - GRAM + 1,): a polynomial of its code points, mixed as in MurmurHash3."""
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    count = len(codes) - GRAM + 1
    hashes = codes[:count].copy()
    for offset in range(1, GRAM):
        hashes *= BASE
        hashes += codes[offset : offset + count]
    for shift, factor in MIX:
        hashes ^= hashes >> shift
        hashes *= factor
    hashes ^= hashes >> np.uint32(16)
    hashes[hashes == EMPTY] -= np.uint32(1)
    return hashes


def _filled(least: NDArray[np.uint32]) -> Signatures:
    """Low bytes of the least hashes, (texts, BINS), empty bins filled."""
    signatures = least.astype(np.uint8)
    rows, bins = np.nonzero(least == EMPTY)
    for order in PROBES:
        if not len(rows):
            break
        found = least[rows, order[bins]]
        full = found != EMPTY
        signatures[rows[full], bins[full]] = found[full]
        rows, bins = rows[~full], bins[~full]
    return signatures
