"""Which sequences share a row of at most `max_length` tokens.

In: lengths, and weights above 1. Out: bins, lists of indices; every index once, or as often as its weight has it, and
no sequence cut. How they share rows is in `best_fit.py`. A million lengths take about a second on one core.

`concat` is XTuner's way: shuffled sequences end to end, cut every `max_length` tokens. The last row is shorter. Nothing
is lost but the prediction of the first token after a cut, which has nothing before it.

A sequence of weight 2.4 stands twice in every epoch, and once more in two of five: in which ones is drawn from the seed
for each sequence (systematic sampling, Madow 1949), so over E epochs it stands within 1 of 2.4 E times.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sft_core.errors import DataError
from sft_core.pack.best_fit import share_rows

PACKINGS = ("best_fit", "concat", "none")
Lengths = Sequence[int] | NDArray[Any]
Weights = Sequence[float] | NDArray[Any]
Numbers = NDArray[np.signedinteger[Any]]
COPIES = 2**32 - 1
"""Where an epoch stands in the seed of an epoch's draws: of those that hold for all epochs."""


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
    """Bins of whole sequences; equal lengths in order of index. DataError for a length outside 1..max_length.

    >>> pack_lengths([5, 3, 9, 2], max_length=10)
    [[2], [0, 1, 3]]
    """
    sizes = _checked(lengths, max_length)
    order = np.argsort(-sizes, kind="stable")
    bins = share_rows(sizes[order], max_length)
    return _lists(order[np.argsort(bins, kind="stable")], _offsets(bins))


def copies(weights: Weights, seed: int, epoch: int) -> Numbers:
    """How often each sequence stands in an epoch: its weight rounded down, or one more; below 1 counts as 1."""
    floors = np.maximum(np.floor(weights), 1)
    parts = np.maximum(np.asarray(weights, np.float64) - floors, 0)
    if not parts.any():
        return floors.astype(np.int64)
    offsets = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, COPIES]))).random(len(parts))
    more = np.floor(offsets + parts * (epoch + 1)) - np.floor(offsets + parts * epoch)
    return (floors + more).astype(np.int64)


def epoch_bins(
    lengths: Lengths, max_length: int, packing: str, seed: int, epoch: int, weights: Weights | None = None
) -> list[list[Any]]:
    """Bins of one epoch, lists of indices; a sequence that `concat` cut is there as `Piece`s.

    >>> epoch_bins([3, 3, 2], 4, "concat", seed=0, epoch=0)
    [[2, Piece(number=0, first=0, last=2)], [Piece(number=0, first=2, last=3), 1]]
    """
    rows = epoch_rows(lengths, max_length, packing, seed, epoch, weights)
    if rows.first is None or rows.last is None:
        return _lists(rows.members, rows.offsets)
    whole = rows.last - rows.first == np.asarray(lengths)[rows.members]
    places = zip(whole.tolist(), rows.members.tolist(), rows.first.tolist(), rows.last.tolist(), strict=True)
    items = [index if is_whole else Piece(index, first, last) for is_whole, index, first, last in places]
    borders = rows.offsets.tolist()
    return [items[start:end] for start, end in zip(borders, borders[1:], strict=False)]


def epoch_rows(
    lengths: Lengths, max_length: int, packing: str, seed: int, epoch: int, weights: Weights | None = None
) -> PackedRowsIndex:
    """Rows of one epoch. (seed, epoch) decides who shares a row among equals, the order in rows, and that of rows.

    A sequence with a weight of 2 or more is as many members; `weights` None is 1 for all.
    """
    if packing not in PACKINGS:
        raise DataError(f"packing {packing!r}: it is one of {', '.join(PACKINGS)}")
    sizes = _checked(lengths, max_length)
    numbers = np.arange(len(sizes), dtype=np.int32)
    if weights is not None:
        numbers = np.repeat(numbers, copies(weights, seed, epoch))
        sizes = sizes[numbers]
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch])))
    order = generator.permutation(len(sizes)).astype(np.int32)
    if packing == "none":
        return PackedRowsIndex(np.arange(len(sizes) + 1), numbers[order])
    if packing == "concat":
        return _concat(sizes[order], numbers[order], max_length)
    order = order[np.argsort(-sizes[order], kind="stable")]  # longest first
    bins = share_rows(sizes[order], max_length)
    rank = generator.permutation(len(sizes)).astype(np.int32)[order]
    place = np.argsort(generator.permutation(int(bins.max(initial=-1)) + 1))  # where each bin comes in the epoch
    bins = place.astype(np.int32)[bins]
    return PackedRowsIndex(_offsets(bins), numbers[order[np.lexsort((rank, bins))]])


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
    """Lengths as int32, as all numbers of sequences are here: a million take 4 MB, and several such arrays live."""
    sizes = np.asarray(lengths, dtype=np.int64)
    wrong = np.flatnonzero((sizes < 1) | (sizes > max_length))
    if len(wrong):
        raise DataError(
            f"sequence {wrong[0]} has {sizes[wrong[0]]} tokens, a packed row holds 1 to {max_length} "
            f"({len(wrong)} such sequences); raise pack.max_length or leave them out"
        )
    return sizes.astype(np.int32)
