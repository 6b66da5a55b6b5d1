"""A year of nightly retrainings against one champion, drawn 2,000 times: what the gate promotes by luck, what it finds.

In: nothing but a seed. Out: two tables in Markdown. Run: `python benchmarks/gate_simulation.py` (`--years 200` is
quick). The gate's own p-values and levels are used, vectorised over the nights of a year.

Rows of one year are the same every night. A row's difference (champion's loss minus candidate's, nats a token) is
`volatility * (shared + own) * tokens`: volatility is the root of an inverse gamma variable, which makes Student's
t of it, 3 degrees of freedom; tokens are lognormal; half of the variance is shared by all candidates of the year,
which have the champion and most training rows in common, the other half each draws anew. Differences have one of four
shapes, all with the mean zero: `symmetric` normal ones; one minus a variable that is never negative, which is many
small gains and a few large losses: `skewed` (gamma of shape 2, skewness -1.4), `heavy` (a squared normal, -2.8),
`extreme` (lognormal, -6.2). With `even` rows there are neither tokens nor volatility: nothing but the shape, so few
rows show little of its tail.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from sft_core.register.spending import CHALLENGES_A_YEAR, level_of
from sft_core.register.statistics import normal_quantile, normal_tail, saddlepoint_p, unseen_row_p

Shape = Literal["symmetric", "skewed", "heavy", "extreme"]
NIGHTS = 365
ROW_SPREAD = 0.04
"""Standard deviation of a row's difference, as a fraction of the mean loss (see docs/adr/0007-gate.md)."""
SHARED = 0.5
ALPHA = 0.05
LATE = 100
"""Challenges without a gain before the gain of the second half of the table sets in."""

BLOCKS = (4, 16, 64, 160, 260)
"""Nights after which a year is left if every schedule has promoted."""
NAIVE = "naive 0.05"
SCHEDULES: dict[str, Callable[[int], float]] = {
    "gate": lambda k: level_of(k, ALPHA),
    "6/(pi k)^2": lambda k: ALPHA * 6 / (np.pi * k) ** 2,
    "1/365": lambda _: ALPHA / CHALLENGES_A_YEAR,
    "1/(k log^2 k)": lambda k: ALPHA / 3.3877 / ((k + 1) * np.log(k + 1) ** 2),
    NAIVE: lambda _: ALPHA,
}


@dataclass(frozen=True, slots=True)
class Year:
    """`z`: (nights, rows), weighted differences under no difference at all; `tokens`: (rows,)."""

    z: NDArray[np.float64]
    tokens: NDArray[np.float64]


def draw_year(rng: np.random.Generator, rows: int, shape: Shape = "symmetric", *, even: bool = False) -> Year:
    """One year; the mean loss is 1 nat a token, so that a gain is a fraction of it."""
    tokens = np.ones(rows) if even else np.exp(rng.normal(0.0, 0.8, rows))
    # 1 / sqrt(chi2_3): Student's t when times a normal
    volatility = ROW_SPREAD * (np.ones(rows) if even else 1 / np.sqrt(rng.gamma(1.5, 2.0, rows)))
    shared, own = _draw(rng, (1, rows), shape), _draw(rng, (NIGHTS, rows), shape)
    mixed = np.sqrt(SHARED) * shared + np.sqrt(1 - SHARED) * own
    return Year(mixed * volatility * tokens, tokens)


def _draw(rng: np.random.Generator, size: tuple[int, int], shape: Shape) -> NDArray[np.float32]:
    """Mean 0, variance 1."""
    if shape == "skewed":
        lost = rng.standard_exponential(size, dtype=np.float32) + rng.standard_exponential(size, dtype=np.float32)
        return (2 - lost) / np.float32(np.sqrt(2))
    normal = rng.standard_normal(size, dtype=np.float32)
    if shape == "heavy":
        return (1 - np.square(normal)) / np.float32(np.sqrt(2))
    if shape == "extreme":
        return (np.float32(np.exp(0.5)) - np.exp(normal)) / np.float32(np.sqrt(np.e * (np.e - 1)))
    return normal


def first_promotions(
    rng: np.random.Generator,
    rows: int,
    gain: float,
    first_challenge: int = 1,
    *,
    shape: Shape = "symmetric",
    even: bool = False,
) -> dict[str, int]:
    """The first night, from 1, on which each schedule promotes; NIGHTS + 1 if none does."""
    year = draw_year(rng, rows, shape, even=even)
    z = year.z + gain * year.tokens
    found: dict[str, int] = {}
    for nights in np.split(np.arange(NIGHTS), BLOCKS):
        if len(found) == len(SCHEDULES):
            break
        for name, passed in _passes(z[nights], nights + first_challenge).items():
            if passed.any():
                found.setdefault(name, int(nights[passed.argmax()]) + 1)
    return {name: found.get(name, NIGHTS + 1) for name in SCHEDULES}


def _passes(z: NDArray[np.float64], challenges: NDArray[np.int64]) -> dict[str, NDArray[np.bool_]]:
    """Whether each night (a row of `z`) passes, by schedule; sums far too small for any are not looked at closely."""
    levels = {name: np.array([schedule(k) for k in challenges]) for name, schedule in SCHEDULES.items()}
    highest = np.max([level for name, level in levels.items() if name != NAIVE], axis=0)
    size = z.sum(axis=1) / np.sqrt(np.square(z).sum(axis=1))
    worth = size > 0.75 * np.array([normal_quantile(level) for level in highest])
    p = np.ones(len(z))
    if worth.any():
        p[worth] = saddlepoint_p(z[worth])
    worth &= p <= highest
    if worth.any():
        p[worth] = np.maximum(p[worth], unseen_row_p(z[worth]))
    t = z.mean(axis=1) / (z.std(axis=1, ddof=1) / np.sqrt(z.shape[1]))
    return {name: (normal_tail(t) if name == NAIVE else p) <= level for name, level in levels.items()}


def simulate(seed: int, years: int, rows: int, gain: float, **options: object) -> dict[str, NDArray[np.int64]]:
    """First promotions of many years, by schedule."""
    rng = np.random.default_rng(seed)
    found = [first_promotions(rng, rows, gain, **options) for _ in range(years)]  # type: ignore[arg-type]
    return {name: np.array([year[name] for year in found]) for name in SCHEDULES}


def _false_promotions(seed: int, years: int, sizes: list[int]) -> None:
    print(f"\nYears with a promotion although no candidate is better ({years} years of {NIGHTS} nights)\n")
    print(f"| rows | differences | {' | '.join(SCHEDULES)} |\n|---|---|{'---|' * len(SCHEDULES)}")
    for rows in sizes:
        for shape, even in product(get_args(Shape), (False, True)):
            nights = simulate(seed, years, rows, 0.0, shape=shape, even=even)
            shares = [f"{(nights[name] <= NIGHTS).mean():.1%}" for name in SCHEDULES]
            print(f"| {rows} | {shape}{', even' if even else ''} | {' | '.join(shares)} |", flush=True)


def _found(seed: int, years: int, sizes: list[int]) -> None:
    print("\nNight on which half (nine in ten) of the years have promoted a gain; `-`: not within 365 nights\n")
    print(f"| rows | gain | challenges before | {' | '.join(SCHEDULES)} |\n|---|---|---|{'---|' * len(SCHEDULES)}")
    for rows in sizes:
        for gain in (0.005, 0.01, 0.02, 0.05):
            for before in (0, LATE):
                nights = simulate(seed, years, rows, gain, first_challenge=before + 1)
                cells = [" ".join(_night(nights[name], share) for share in (0.5, 0.9)) for name in SCHEDULES]
                print(f"| {rows} | {gain:.1%} | {before} | {' | '.join(cells)} |", flush=True)


def _night(nights: NDArray[np.int64], share: float) -> str:
    night = int(np.quantile(nights, share, method="higher"))
    return str(night) if night <= NIGHTS else "-"


def main() -> None:
    """Both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--years", type=int, default=2000)
    parser.add_argument("--power-years", type=int, default=200)
    parser.add_argument("--rows", type=int, nargs="+", default=[20, 50, 100, 500, 2000])
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args()
    started = time.monotonic()
    if options.years:
        _false_promotions(options.seed, options.years, options.rows)
    if options.power_years:
        _found(options.seed, options.power_years, options.rows)
    print(f"\n{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
