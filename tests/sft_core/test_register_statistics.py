"""p-values against counting and drawing, levels against their sum, and a year of luck."""

import itertools
import math

import numpy as np
import pytest

from benchmarks.gate_simulation import ALPHA, NAIVE, NIGHTS, Shape, simulate
from sft_core.register.spending import level_of, rows_needed
from sft_core.register.statistics import interval, p_value, saddlepoint_p, sign_flip_p, standard_error, unseen_row_p

YEARS = 150


def counted(z: np.ndarray) -> float:
    """All sign patterns, one by one."""
    signs = (np.arange(2 ** len(z))[:, None] >> np.arange(len(z)) & 1) * 2 - 1  # (patterns, rows)
    return float(np.mean(signs @ np.abs(z) >= z.sum() - 1e-9))


@pytest.mark.parametrize("seed", range(5))
def test_few_rows_are_counted_out(seed: int) -> None:
    z = np.random.default_rng(seed).normal(0.5, 1.0, 10)
    assert sign_flip_p(z) == pytest.approx(counted(z) if z.sum() > 0 else sign_flip_p(z), abs=1e-12)


@pytest.mark.parametrize("draw", ["normal", "t3", "whole"])
def test_the_saddlepoint_agrees_with_counting_far_out(draw: str) -> None:
    rng = np.random.default_rng(3)
    for _ in range(4):
        z = {"normal": rng.normal(1, 1, 16), "t3": rng.standard_t(3, 16) + 1, "whole": rng.integers(1, 5, 16) * 1.0}[
            draw
        ]
        z[:2] *= -1
        if z.sum() > 0:
            assert float(saddlepoint_p(z[None])[0]) == pytest.approx(counted(z), rel=0.25)


def test_yes_and_no_is_the_sign_test() -> None:
    z = np.array([1.0] * 9 + [-1.0] * 1 + [0.0] * 100)
    assert p_value(z) == pytest.approx(11 / 1024)  # P(Binomial(10, 1/2) >= 9)


def exact_unseen_row(z: np.ndarray) -> float:
    """P(a sum of exponentials, scaled by z and by the unseen row, is not above zero), in partial fractions."""
    scales = np.append(z, -1.6 * np.abs(z).max())
    return float(
        sum(math.prod(c / (c - other) for other in np.delete(scales, i)) for i, c in enumerate(scales) if c < 0)
    )


@pytest.mark.parametrize("seed", range(6))
def test_the_unseen_row_agrees_with_partial_fractions(seed: int) -> None:
    z = np.random.default_rng(seed).normal(3.0, 1.0, 12)
    assert float(unseen_row_p(z[None])[0]) == pytest.approx(exact_unseen_row(z), rel=0.05)


def test_the_unseen_row_by_hand() -> None:
    """All gained, and the unseen row lost 1.6 times the largest, 6.4: the product of 6.4 / (6.4 + z)."""
    z = np.array([4.0] * 5 + [2.0] * 5)
    assert float(unseen_row_p(z[None])[0]) == pytest.approx((6.4 / 10.4 * 6.4 / 8.4) ** 5, rel=0.03)
    many = np.tile(z, 30)  # 300 rows: a tenth more
    assert float(unseen_row_p(many[None])[0]) == pytest.approx((4.4 / 8.4 * 4.4 / 6.4) ** 150, rel=0.03)


@pytest.mark.parametrize("rows", [20, 50, 100, 500])
@pytest.mark.parametrize("losses", ["exponential", "square"])
def test_few_large_losses_seldom_pass(rows: int, losses: str) -> None:
    """Mean zero, skewness -2 and -2.8, rows of one length: from 100 rows on as seldom as a level says, on fewer at most
    2.5 times as often; by sign flips alone up to 24 times at 0.001."""
    rng = np.random.default_rng(rows)
    shape = (4000, rows)
    lost = rng.standard_exponential(shape) if losses == "exponential" else np.square(rng.standard_normal(shape))
    z = (1 - lost)[(1 - lost).sum(axis=1) > 0]
    p = np.maximum(saddlepoint_p(z), unseen_row_p(z))
    for level in (0.001, 0.0153, 0.05):
        expected = 4000 * level * (1 if rows >= 100 else 2.5)
        assert (p <= level).sum() <= expected + 3 * math.sqrt(expected)


def test_no_difference_at_all_and_values_that_are_not_finite_prove_nothing() -> None:
    assert p_value(np.zeros(50)) == 1.0
    assert p_value(np.array([1.0] * 50 + [math.nan])) == 1.0
    assert p_value(np.array([1.0] * 50 + [math.inf])) == 1.0


def test_many_small_gains_that_few_large_losses_pay_for_count_for_less_than_their_mirror() -> None:
    losses = np.array([1.0] * 97 + [-12.0] * 3) + np.linspace(0, 0.1, 100)
    mirrored = 2 * losses.mean() - losses  # the same mean and spread, the tail on the good side
    assert float(unseen_row_p(losses[None])[0]) > float(unseen_row_p(mirrored[None])[0])
    assert p_value(losses) > 1.5 * sign_flip_p(losses)


@pytest.mark.parametrize("rows", [12, 40, 400])
def test_under_no_difference_p_is_below_a_level_as_often_as_the_level_says(rows: int) -> None:
    rng = np.random.default_rng(rows)
    p = np.array([p_value(rng.standard_t(3, rows) * np.exp(rng.normal(0, 1, rows))) for _ in range(1500)])
    for level in (0.01, 0.05):
        bound = level + 3 * math.sqrt(level * (1 - level) / len(p))
        assert (p <= level).mean() <= bound


def test_the_interval_holds_the_ratio_as_often_as_it_says() -> None:
    rng = np.random.default_rng(5)
    held = 0
    for _ in range(120):
        weight = np.exp(rng.normal(0, 0.8, 60))
        low, high = interval(weight * (0.3 + rng.standard_normal(60)), weight, 0.95)
        held += low <= 0.3 <= high
    assert held / 120 >= 0.95 - 3 * math.sqrt(0.05 * 0.95 / 120)
    low, high = interval(np.ones(3), np.ones(3), 0.95)
    assert (low, high) == (-math.inf, math.inf)  # three rows say nothing at this confidence


def test_the_standard_error_counts_rows_not_tokens() -> None:
    rng = np.random.default_rng(6)
    weight = rng.integers(1, 200, 500).astype(float)
    difference = weight * (0.2 + rng.standard_normal(500))
    drawn = [rng.integers(0, 500, 500) for _ in range(2000)]
    bootstrapped = np.std([difference[rows].sum() / weight[rows].sum() for rows in drawn])
    assert standard_error(difference, weight) == pytest.approx(bootstrapped, rel=0.1)


@pytest.mark.parametrize("a_year", [52, 365, 1460])
def test_any_year_of_challenges_spends_at_most_alpha(a_year: int) -> None:
    levels = [level_of(k, 0.05, a_year) for k in range(1, 3000)]
    assert all(a > b for a, b in itertools.pairwise(levels))
    assert max(sum(levels[start : start + a_year]) for start in range(0, 1500, 50)) <= 0.05
    assert sum(levels[:a_year]) > 0.0495


def test_rows_needed_is_where_the_best_case_passes() -> None:
    for level in (0.015, 1e-4, 7e-5):
        needed = rows_needed(level)
        assert p_value(np.ones(needed)) <= level < p_value(np.ones(needed - 1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "shape", "even"), [(50, "heavy", True), (100, "skewed", False), (100, "heavy", False)]
)
def test_a_year_of_luck_promotes_at_most_in_one_of_twenty(rows: int, shape: Shape, even: bool) -> None:
    nights = simulate(11, YEARS, rows, 0.0, shape=shape, even=even)
    lucky = int((nights["gate"] <= NIGHTS).sum())
    expected, spread = ALPHA * YEARS, math.sqrt(ALPHA * (1 - ALPHA) * YEARS)
    assert lucky <= expected + 2 * spread
    assert (nights[NAIVE] <= NIGHTS).mean() > 0.5  # what a nightly test at 0.05 would do


@pytest.mark.slow
def test_a_gain_of_five_percent_is_found_on_the_first_night() -> None:
    assert np.quantile(simulate(12, 40, 200, 0.05)["gate"], 0.9) == 1
