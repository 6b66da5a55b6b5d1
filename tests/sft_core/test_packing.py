"""Bins: nothing lost, nothing cut, the same every time."""

import numpy as np
import pytest

from sft_core.errors import DataError
from sft_core.pack import epoch_bins, pack_lengths


def lengths_like(count: int, max_length: int, seed: int = 0) -> list[int]:
    generator = np.random.default_rng(seed)
    drawn = np.exp(generator.normal(np.log(max_length / 8), 1.0, count)).astype(int)
    return np.clip(drawn, 1, max_length).tolist()


def one_at_a_time(lengths: list[int], max_length: int) -> list[list[int]]:
    """Best-fit decreasing as the books have it, in quadratic time."""
    bins: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        rooms = [(max_length - sum(lengths[i] for i in members), k) for k, members in enumerate(bins)]
        fits = [(room, k) for room, k in rooms if room >= lengths[index]]
        if fits:
            bins[min(fits)[1]].append(index)
        else:
            bins.append([index])
    return bins


def test_literal() -> None:
    assert pack_lengths([5, 3, 9, 2], max_length=10) == [[2], [0, 1, 3]]
    assert pack_lengths([10, 1, 10], max_length=10) == [[0], [2], [1]]
    assert pack_lengths([3, 3, 3, 3], max_length=10) == [[0, 1, 2], [3]]
    assert pack_lengths([], max_length=10) == []


@pytest.mark.parametrize("max_length", [7, 64, 1023, 1024, 1025, 4096])
def test_rooms_left_are_those_of_best_fit_one_at_a_time(max_length: int) -> None:
    for seed in range(10):
        lengths = lengths_like(60, max_length, seed)
        ours, theirs = (
            sorted(sum(lengths[i] for i in members) for members in bins)
            for bins in (pack_lengths(lengths, max_length), one_at_a_time(lengths, max_length))
        )
        assert ours == theirs


@pytest.mark.parametrize("packing", ["best_fit", "none"])
def test_nothing_lost_nothing_cut(packing: str) -> None:
    lengths = lengths_like(5000, 2048)
    for epoch in range(3):
        bins = epoch_bins(lengths, 2048, packing, seed=1, epoch=epoch)
        assert sorted(i for members in bins for i in members) == list(range(5000))
        assert all(1 <= sum(lengths[i] for i in members) <= 2048 for members in bins)
    assert packing != "none" or all(len(members) == 1 for members in bins)


def test_equal_input_equal_bins() -> None:
    lengths = lengths_like(1000, 512)
    assert pack_lengths(lengths, 512) == pack_lengths(np.array(lengths, np.int32), 512)
    assert epoch_bins(lengths, 512, "best_fit", 3, 4) == epoch_bins(lengths, 512, "best_fit", 3, 4)


def test_literal_epoch() -> None:
    """Notices a change of the drawing, which would need a new STEP_VERSION."""
    assert epoch_bins([5, 3, 9, 2, 5], 10, "best_fit", 42, 0) == [[1, 3], [2], [0, 4]]
    assert epoch_bins([1, 1, 1, 1], 10, "none", 42, 0) == [[3], [2], [1], [0]]


def test_every_epoch_has_other_neighbours() -> None:
    lengths = [100] * 40
    neighbours = [
        {frozenset(members) for members in epoch_bins(lengths, 200, "best_fit", 0, epoch)} for epoch in range(3)
    ]
    assert not neighbours[0] & neighbours[1] & neighbours[2]
    assert neighbours[0] != neighbours[1]
    assert epoch_bins(lengths, 200, "best_fit", 0, 0) != epoch_bins(lengths, 200, "best_fit", 1, 0)


def test_wrong_lengths_are_named() -> None:
    with pytest.raises(DataError, match="sequence 1 has 11 tokens, a packed row holds 1 to 10"):
        pack_lengths([3, 11], 10)
    with pytest.raises(DataError, match="sequence 0 has 0 tokens"):
        epoch_bins([0], 10, "best_fit", 0, 0)
    with pytest.raises(DataError, match="packing 'first_fit'"):
        epoch_bins([1], 10, "first_fit", 0, 0)


def test_a_hundred_thousand_lengths_fill_rows() -> None:
    lengths = lengths_like(100_000, 2048)
    bins = pack_lengths(lengths, 2048)
    assert sum(lengths) / (len(bins) * 2048) > 0.999
