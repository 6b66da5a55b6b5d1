"""Which held-out conversations are near duplicates of training ones.

In: signatures (see `sketch`) of the held-out side, all of them, and of the training side, some at a time. Out: matches.
Only pairs that agree in all bytes of one of several bands are compared (locality-sensitive hashing; Leskovec, Rajaraman
& Ullman, Mining of Massive Datasets, 3.4); bands are as wide as still find 99% of the pairs at the threshold.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sft_core.normalize.sketch import BINS, Signatures, similarity

RECALL = 0.99
WIDEST, NARROWEST = 8, 2
"""Bytes of a band."""
MOST_PAIRS = 1 << 20
"""Compared at a time."""
COMPARED = 1 << 13
FACTOR = np.uint64(0x9E3779B97F4A7C15)

Indices = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Match:
    """A held-out conversation and the training one that it is like, by their places in the signatures."""

    held_out: int
    training: int
    similarity: float


class HeldOutSignatures:
    """The held-out side, by its bands. A conversation that was matched once is looked for no more."""

    def __init__(self, signatures: Signatures, threshold: float) -> None:
        self._signatures, self._threshold = signatures, threshold
        self._width = band_width(threshold)
        self._left = np.ones(len(signatures), bool)
        self._index()

    def matches(self, training: Signatures) -> Iterator[Match]:
        """Matches with these training signatures, of each held-out conversation at most one: the nearest."""
        if not len(self._rows) or not len(training):
            return
        found = [band.find(keys) for band, keys in zip(self._bands, band_keys(training, self._width), strict=True)]
        if sum(int(counts.sum()) for _, _, counts in found) > MOST_PAIRS and len(training) > 1:
            half = len(training) // 2
            yield from self.matches(training[:half])
            for match in self.matches(training[half:]):
                yield Match(match.held_out, match.training + half, match.similarity)
            return
        pairs = [band.pairs(*entry) for band, entry in zip(self._bands, found, strict=True)]
        codes = np.unique(np.concatenate([held * len(training) + trained for held, trained in pairs]))
        yield from self._nearest(self._rows[codes // len(training)], codes % len(training), training)
        if 2 * self._left[self._rows].sum() < len(self._rows):
            self._index()

    def _nearest(self, held: Indices, trained: Indices, training: Signatures) -> Iterator[Match]:
        left = self._left[held]
        held, trained = held[left], trained[left]
        equal = np.empty(len(held), np.int64)
        for start in range(0, len(held), COMPARED):
            some = slice(start, start + COMPARED)
            equal[some] = (self._signatures[held[some]] == training[trained[some]]).sum(axis=1)
        near = similarity(equal)
        order = np.lexsort((trained, -near, held))
        order = order[near[order] >= self._threshold]
        rows, first = np.unique(held[order], return_index=True)
        self._left[rows] = False
        for row, place in zip(rows.tolist(), order[first].tolist(), strict=True):
            yield Match(row, int(trained[place]), float(near[place]))

    def _index(self) -> None:
        self._rows = np.flatnonzero(self._left)
        self._bands = [_Band(keys) for keys in band_keys(self._signatures[self._rows], self._width)]


class _Band:
    """One band of the held-out side: its keys in order, and a small table that says which are surely not there."""

    def __init__(self, keys: NDArray[np.uint64]) -> None:
        self._order = np.argsort(keys, kind="stable")
        self._keys = keys[self._order]
        self._shift = np.uint64(64 - max(10, (8 * len(keys)).bit_length()))
        self._there = np.zeros(1 << int(64 - self._shift), bool)
        self._there[self._slots(keys)] = True

    def find(self, keys: NDArray[np.uint64]) -> tuple[Indices, Indices, Indices]:
        """Of the keys that are there: their places, where they begin in order, how often they are there."""
        places = np.flatnonzero(self._there[self._slots(keys)])
        begin = np.searchsorted(self._keys, keys[places], "left")
        counts = np.searchsorted(self._keys, keys[places], "right") - begin
        return places, begin, counts

    def pairs(self, places: Indices, begin: Indices, counts: Indices) -> tuple[Indices, Indices]:
        """(held-out, training) for all of what `find` gave."""
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return self._order[np.repeat(begin, counts) + within], np.repeat(places, counts)

    def _slots(self, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
        return (keys * FACTOR) >> self._shift


def band_width(threshold: float) -> int:
    """Bytes of a band, so that a pair of this similarity agrees in one of them nearly always.

    >>> band_width(0.8), band_width(0.5), band_width(1.0)
    (6, 3, 8)
    """
    widths = range(WIDEST, NARROWEST, -1)
    return next((w for w in widths if 1 - (1 - threshold**w) ** _band_count(w) >= RECALL), NARROWEST)


def band_keys(signatures: Signatures, width: int) -> list[NDArray[np.uint64]]:
    """For each band, every conversation's bytes in it as a number, (conversations,)."""
    mask = np.uint64((1 << 8 * width) - 1)
    starts = range(0, _band_count(width) * width, width)
    return [np.ascontiguousarray(signatures[:, at : at + 8]).view("<u8")[:, 0] & mask for at in starts]


def _band_count(width: int) -> int:
    """Bands that begin where eight bytes are left."""
    return (BINS - 8) // width + 1
