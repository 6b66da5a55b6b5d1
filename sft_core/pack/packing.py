"""Which sequences share a row of at most `max_length` tokens.

In: lengths. Out: bins, lists of indices; every index once, no sequence cut. Best-fit decreasing (Johnson 1974): longest
first, each into the fullest bin that still has room. Open bins are kept by the room left, with a bitmap over rooms, so
a placement costs the same whatever the number of bins. A million lengths take about a second on one core.

`concat` is XTuner's way: shuffled sequences end to end, cut every `max_length` tokens. The last row is shorter. Nothing
is lost but the prediction of the first token after a cut, which has nothing before it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sft_core.errors import DataError

WORD_BITS = 1024
PACKINGS = ("best_fit", "concat", "none")
Lengths = Sequence[int] | NDArray[Any]
Numbers = NDArray[np.int64]


class Piece(NamedTuple):
    """Tokens `first` to `last` (excluded) of sequence `number`, which `concat` cut."""

    number: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class PackedRowsIndex:
    """Rows of one epoch, laid end to end: row r is `offsets[r]` to `offsets[r + 1]` of the other arrays."""

    offsets: Numbers
    members: Numbers
    """Numbers of sequences."""
    first: Numbers | None = None
    """The token at which each member begins; None where all are whole."""
    last: Numbers | None = None


def pack_lengths(lengths: Lengths, max_length: int) -> list[list[int]]:
    """Best-fit bins; equal lengths in order of index. DataError for a length outside 1..max_length.

    >>> pack_lengths([5, 3, 9, 2], max_length=10)
    [[2], [0, 1, 3]]
    """
    sizes = _checked(lengths, max_length)
    order = np.argsort(-sizes, kind="stable")
    bins = _best_fit(sizes[order], max_length)
    return _lists(order[np.argsort(bins, kind="stable")], _offsets(bins))


def epoch_bins(lengths: Lengths, max_length: int, packing: str, seed: int, epoch: int) -> list[list[Any]]:
    """Bins of one epoch, lists of indices; a sequence that `concat` cut is there as `Piece`s.

    >>> epoch_bins([3, 3, 2], 4, "concat", seed=0, epoch=0)
    [[2, Piece(number=0, first=0, last=2)], [Piece(number=0, first=2, last=3), 1]]
    """
    rows = epoch_rows(lengths, max_length, packing, seed, epoch)
    if rows.first is None or rows.last is None:
        return _lists(rows.members, rows.offsets)
    whole = rows.last - rows.first == np.asarray(lengths)[rows.members]
    places = zip(whole.tolist(), rows.members.tolist(), rows.first.tolist(), rows.last.tolist(), strict=True)
    items = [index if is_whole else Piece(index, first, last) for is_whole, index, first, last in places]
    borders = rows.offsets.tolist()
    return [items[start:end] for start, end in zip(borders, borders[1:], strict=False)]


def epoch_rows(lengths: Lengths, max_length: int, packing: str, seed: int, epoch: int) -> PackedRowsIndex:
    """Rows of one epoch. (seed, epoch) decides who shares a row among equals, the order in rows, and that of rows."""
    if packing not in PACKINGS:
        raise DataError(f"packing {packing!r}: it is one of {', '.join(PACKINGS)}")
    sizes = _checked(lengths, max_length)
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch])))
    shuffled = generator.permutation(len(sizes))
    if packing == "none":
        return PackedRowsIndex(np.arange(len(sizes) + 1), shuffled)
    if packing == "concat":
        return _concat(sizes[shuffled], shuffled, max_length)
    order = shuffled[np.argsort(-sizes[shuffled], kind="stable")]
    bins = _best_fit(sizes[order], max_length)
    rank = generator.permutation(len(sizes))
    place = np.argsort(generator.permutation(int(bins.max(initial=-1)) + 1))  # where each bin comes in the epoch
    placed = place[bins]
    return PackedRowsIndex(_offsets(placed), order[np.lexsort((rank[order], placed))])


def _concat(sizes: Numbers, indices: Numbers, max_length: int) -> PackedRowsIndex:
    """Sequences end to end in the order given, cut every `max_length` tokens."""
    ends = np.cumsum(sizes)  # in tokens of the whole
    total = int(ends[-1]) if len(ends) else 0
    lasts = np.union1d(ends, np.arange(max_length, total, max_length))  # of pieces
    firsts = np.concatenate([lasts[:0], [0], lasts])[: len(lasts)]
    owners = np.searchsorted(ends, firsts, side="right")
    begins = (ends - sizes)[owners]
    return PackedRowsIndex(_offsets(firsts // max_length), indices[owners], firsts - begins, lasts - begins)


def _offsets(bins: Numbers) -> Numbers:
    """Where each bin begins once members lie bin by bin, and where the last ends."""
    return np.concatenate([[0], np.cumsum(np.bincount(bins))]).astype(np.int64)


def _lists(members: Numbers, offsets: Numbers) -> list[list[int]]:
    items, borders = members.tolist(), offsets.tolist()
    return [items[start:end] for start, end in zip(borders, borders[1:], strict=False)]


def _checked(lengths: Lengths, max_length: int) -> Numbers:
    sizes = np.asarray(lengths, dtype=np.int64)
    wrong = np.flatnonzero((sizes < 1) | (sizes > max_length))
    if len(wrong):
        raise DataError(
            f"sequence {wrong[0]} has {sizes[wrong[0]]} tokens, a packed row holds 1 to {max_length} "
            f"({len(wrong)} such sequences); raise pack.max_length or leave them out"
        )
    return sizes


def _best_fit(sizes: Numbers, max_length: int) -> Numbers:
    """Number of each sequence's bin. `sizes` fall; equal ones are placed as many at a time as the chosen bin takes."""
    bins = np.empty(len(sizes), np.int64)
    opened = 0
    open_bins: list[list[int]] = [[] for _ in range(max_length + 1)]  # by room left; the newest is taken first
    rooms = _Bitmap(max_length + 1)
    distinct, counts = np.unique(-sizes, return_counts=True)
    start = 0
    for size, same in zip((-distinct).tolist(), counts.tolist(), strict=True):
        end = start + same
        while start < end:
            room = rooms.first_from(size)
            if room < 0:
                room, chosen = max_length, opened
                opened += 1
            else:
                chosen = open_bins[room].pop()
                if not open_bins[room]:
                    rooms.clear(room)
            count = min(room // size, end - start)
            bins[start : start + count] = chosen
            start += count
            left = room - count * size
            if left:
                if not open_bins[left]:
                    rooms.set(left)
                open_bins[left].append(chosen)
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
