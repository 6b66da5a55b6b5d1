"""Which sequences share a row of at most `max_length` tokens.

In: lengths. Out: bins, lists of indices; every index once, no sequence cut. Best-fit decreasing (Johnson 1974): longest
first, each into the fullest bin that still has room. Open bins are kept by the room left, with a bitmap over rooms, so
a placement costs the same whatever the number of bins. A million lengths take 1 to 4 s on one core.
"""

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sft_core.errors import DataError

WORD_BITS = 1024
PACKINGS = ("best_fit", "none")
Lengths = Sequence[int] | NDArray[Any]


def pack_lengths(lengths: Lengths, max_length: int) -> list[list[int]]:
    """Best-fit bins; equal lengths in order of index. DataError for a length outside 1..max_length.

    >>> pack_lengths([5, 3, 9, 2], max_length=10)
    [[2], [0, 1, 3]]
    """
    sizes = _checked(lengths, max_length)
    order = np.argsort(-sizes, kind="stable")
    return _best_fit(sizes[order].tolist(), order.tolist(), max_length)


def epoch_bins(lengths: Lengths, max_length: int, packing: str, seed: int, epoch: int) -> list[list[int]]:
    """Bins of one epoch. (seed, epoch) decides who shares a row among equals, the order in rows, and that of rows."""
    if packing not in PACKINGS:
        raise DataError(f"packing {packing!r}: it is one of {', '.join(PACKINGS)}")
    sizes = _checked(lengths, max_length)
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch])))
    shuffled = generator.permutation(len(sizes))
    if packing == "none":
        return [[index] for index in shuffled.tolist()]
    order = shuffled[np.argsort(-sizes[shuffled], kind="stable")]
    bins = _best_fit(sizes[order].tolist(), order.tolist(), max_length)
    rank = generator.permutation(len(sizes)).tolist()
    for members in bins:
        members.sort(key=rank.__getitem__)
    return [bins[k] for k in generator.permutation(len(bins)).tolist()]


def _checked(lengths: Lengths, max_length: int) -> NDArray[np.int64]:
    sizes = np.asarray(lengths, dtype=np.int64)
    wrong = np.flatnonzero((sizes < 1) | (sizes > max_length))
    if len(wrong):
        raise DataError(
            f"sequence {wrong[0]} has {sizes[wrong[0]]} tokens, a packed row holds 1 to {max_length} "
            f"({len(wrong)} such sequences); raise pack.max_length or leave them out"
        )
    return sizes


def _best_fit(sizes: list[int], indices: list[int], max_length: int) -> list[list[int]]:
    """`sizes` fall; `indices` name the sequences. Equal sizes are placed as many at a time as the chosen bin takes."""
    bins: list[list[int]] = []
    members: list[int]
    open_bins: list[list[list[int]]] = [[] for _ in range(max_length + 1)]  # by room left; the newest is taken first
    rooms = _Bitmap(max_length + 1)
    start, total = 0, len(sizes)
    while start < total:
        size = sizes[start]
        end = bisect_right(sizes, -size, start, total, key=int.__neg__)
        while start < end:
            room = rooms.first_from(size)
            if room < 0:
                room, members = max_length, []
                bins.append(members)
            else:
                members = open_bins[room].pop()
                if not open_bins[room]:
                    rooms.clear(room)
            count = min(room // size, end - start)
            members += indices[start : start + count]
            start += count
            left = room - count * size
            if left:
                if not open_bins[left]:
                    rooms.set(left)
                open_bins[left].append(members)
    return bins


class _Bitmap:
    """A set of small numbers that finds its least member not below a bound: words of bits, and a bit a word on top."""

    def __init__(self, size: int) -> None:
        self._words = [0] * (size // WORD_BITS + 1)
        self._filled = 0

    def set(self, number: int) -> None:
        word, bit = divmod(number, WORD_BITS)
        self._words[word] |= 1 << bit
        self._filled |= 1 << word

    def clear(self, number: int) -> None:
        word, bit = divmod(number, WORD_BITS)
        self._words[word] &= ~(1 << bit)
        if not self._words[word]:
            self._filled &= ~(1 << word)

    def first_from(self, bound: int) -> int:
        """Least member >= bound, or -1."""
        word, bit = divmod(bound, WORD_BITS)
        bits = self._words[word] >> bit
        if bits:
            return bound + (bits & -bits).bit_length() - 1
        words = self._filled >> (word + 1)
        if not words:
            return -1
        word += (words & -words).bit_length()
        bits = self._words[word]
        return word * WORD_BITS + (bits & -bits).bit_length() - 1
