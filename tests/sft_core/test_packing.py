"""Bins: nothing lost, nothing cut, the same every time."""

import numpy as np
import pytest

from sft_core.errors import DataError
from sft_core.pack import epoch_bins, pack_lengths
from sft_core.pack.best_fit import best_fit, share_rows


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
        lengths = sorted(lengths_like(60, max_length, seed), reverse=True)
        ours = np.bincount(best_fit(np.array(lengths), max_length), weights=lengths).astype(int).tolist()
        theirs = [sum(lengths[i] for i in members) for members in one_at_a_time(lengths, max_length)]
        assert sorted(ours) == sorted(theirs)
        assert len(pack_lengths(lengths, max_length)) == len(theirs)


def test_best_fit_takes_the_fullest_of_the_rows_that_are_there() -> None:
    rooms = np.array([9, 0, 4, 6])
    assert best_fit(np.array([10, 6, 5, 4, 3]), 10, rooms).tolist() == [4, 3, 0, 0, 2]


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
    assert epoch_bins([5, 3, 9, 2, 5], 10, "best_fit", 42, 0) == [[1, 3, 0], [2], [4]]
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


def squares(lengths: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return np.bincount(rows, weights=lengths.astype(float) ** 2)


def test_rows_are_even_in_squares_as_far_as_their_longest_allows() -> None:
    """Literal bounds for alpaca-like lengths; best fit alone is the independent measure."""
    drawn = np.exp(np.random.default_rng(0).normal(np.log(120), 0.75, 100_000)).astype(int)
    lengths = np.sort(np.clip(drawn, 20, 2048))[::-1]
    rows, alone = share_rows(lengths, 2048), best_fit(lengths, 2048)
    assert lengths.sum() / ((rows.max() + 1) * 2048) > 0.997
    even, uneven = squares(lengths, rows), squares(lengths, alone)
    assert even.std() / even.mean() < 0.49  # no packing into so few rows has less than 0.458
    assert uneven.std() / uneven.mean() > 0.75
    assert even.max() / even.mean() < 7.7  # one sequence of 2,048 tokens is 7.4
    longest = np.zeros(rows.max() + 1)
    np.maximum.at(longest, rows, lengths)
    cheap = longest**2 < even.mean()  # rows that no single sequence makes dear
    assert even[cheap].max() / even.mean() < 1.5
    uneven_longest = np.zeros(alone.max() + 1)
    np.maximum.at(uneven_longest, alone, lengths)
    assert uneven[uneven_longest**2 < even.mean()].max() / even.mean() > 1.5


@pytest.mark.parametrize("shape", ["all large", "pairs", "thirds", "one", "tiny"])
def test_evenness_costs_no_rows_where_lengths_are_awkward(shape: str) -> None:
    drawn = np.random.default_rng(3)
    lengths = {
        "all large": drawn.integers(520, 1025, 2000),
        "pairs": np.concatenate([np.full(500, 600), np.full(500, 424)]),
        "thirds": drawn.integers(300, 350, 3000),
        "one": np.array([1024]),
        "tiny": drawn.integers(1, 4, 5000),
    }[shape]
    falling = np.sort(lengths)[::-1]
    rows = share_rows(falling, 1024)
    assert np.bincount(rows, weights=falling).max() <= 1024
    assert rows.max() + 1 <= (best_fit(falling, 1024).max() + 1) * 1.002
    assert set(rows.tolist()) == set(range(rows.max() + 1))
