"""Weights above 1: how often a sequence stands in an epoch."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from sft_core.pack import epoch_bins
from sft_core.pack.packing import Piece, copies

WEIGHTS = [1.0, 1.5, 2.0, 2.4, 3.9, 0.3]


def weights(count: int) -> np.ndarray:
    return np.tile(WEIGHTS, count // len(WEIGHTS))


def test_floor_is_certain_and_one_more_at_most() -> None:
    given = np.maximum(weights(600), 1)
    for epoch in range(20):
        drawn = copies(weights(600), 7, epoch)
        assert (drawn >= np.floor(given)).all()
        assert (drawn <= np.ceil(given)).all()


@pytest.mark.parametrize("epochs", [1, 2, 5, 40])
def test_copies_of_many_epochs_are_within_one_of_the_weight(epochs: int) -> None:
    total = sum(copies(weights(600), 7, epoch) for epoch in range(epochs))
    assert (np.abs(total - np.maximum(weights(600), 1) * epochs) < 1).all()


def test_copies_of_an_epoch_are_a_fair_draw() -> None:
    """1.4 on 10,000 sequences: 4,000 more, standard deviation 49; five of them."""
    for seed in range(5):
        for epoch in range(3):
            more = int((copies(np.full(10_000, 1.4), seed, epoch) - 1).sum())
            assert abs(more - 4000) < 245
    assert (copies(np.full(1000, 1.5), 0, 0) != copies(np.full(1000, 1.5), 1, 0)).any()
    assert (copies(np.full(1000, 1.5), 0, 0) != copies(np.full(1000, 1.5), 0, 1)).any()


def test_literal_copies() -> None:
    """Notices a change of the drawing, which would need a new STEP_VERSION."""
    assert [copies(WEIGHTS, 42, epoch).tolist() for epoch in range(3)] == [
        [1, 1, 2, 3, 4, 1],
        [1, 2, 2, 2, 4, 1],
        [1, 1, 2, 2, 4, 1],
    ]


def test_the_same_in_another_process() -> None:
    script = (
        "from sft_core.pack import epoch_bins\n"
        "print(epoch_bins([5, 3, 9, 2, 5, 7] * 50, 16, 'best_fit', 3, 4, [1.0, 1.5, 2.0, 2.4, 3.9, 0.3] * 50))"
    )
    root = Path(__file__).parents[2]
    child = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, cwd=root)
    assert child.stdout.strip() == str(epoch_bins([5, 3, 9, 2, 5, 7] * 50, 16, "best_fit", 3, 4, WEIGHTS * 50))


@pytest.mark.parametrize("packing", ["best_fit", "concat", "none"])
def test_every_packing_holds_as_many_copies(packing: str) -> None:
    lengths = np.random.default_rng(1).integers(1, 65, 600)
    for epoch in range(3):
        expected = copies(weights(600), 2, epoch)
        bins = epoch_bins(lengths, 64, packing, 2, epoch, weights(600))
        tokens: Counter[int] = Counter()
        for members in bins:
            sizes = [m.last - m.first if isinstance(m, Piece) else int(lengths[m]) for m in members]
            assert 0 < sum(sizes) <= 64
            for member, size in zip(members, sizes, strict=True):
                tokens[member.number if isinstance(member, Piece) else member] += size
        assert [tokens[i] for i in range(600)] == (lengths * expected).tolist()
        assert min(tokens.values()) > 0


@pytest.mark.parametrize("packing", ["best_fit", "concat", "none"])
def test_weights_of_one_are_no_weights(packing: str) -> None:
    lengths = np.random.default_rng(1).integers(1, 65, 200)
    assert epoch_bins(lengths, 64, packing, 2, 1, np.ones(200)) == epoch_bins(lengths, 64, packing, 2, 1)
