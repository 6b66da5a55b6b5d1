"""Is the mean above zero? One-sided p-values for paired differences, exact for few rows, smooth for many.

In: z, one number a held-out row, positive where the tuned model did better. Out: the chance of such a sum if the models
were equally good. Two tests, and the larger p-value counts:

- sign flips (Fisher 1935): if two equally good models may change names, every sign of z is a fair coin. Exact for any
  tails and any number of rows; counted out up to EXACT_ROWS, above by a saddlepoint (Lugannani & Rice 1980, in
  Barndorff-Nielsen's form), which is good at 1e-7, where drawing flips at random would see none.
- the unseen row (Gaffke 2005): many small gains paid for by a few large losses look too certain to the first test. So
  one more row is taken to have lost a little more than the largest difference seen, and all rows get random weights.

No test of a mean is exact for every distribution (Bahadur & Savage 1956): see docs/adr/0007-gate.md for what is left.
"""

import math
from collections.abc import Callable
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

EXACT_ROWS = 18
"""Up to so many non-zero rows all sign patterns are counted."""
NEWTON_STEPS = 30
SECANTS = 30
CLOSE = 1e-3
"""Of a standard error: how well the ends of an interval are known."""
UNSEEN_MORE, UNSEEN_ROWS = 0.6, 30
"""See `unseen_row_p`; chosen with benchmarks/gate_simulation.py."""
LARGE = 300.0
"""cosh overflows a little above 700."""
_NORMAL = NormalDist()


def p_value(z: Array) -> float:
    """The larger of both p-values; 1.0 where a value is not finite or none differs from zero.

    >>> p_value(np.array([1.0, 1, 1, 1, 1])) == 1 / 32
    True
    """
    flips = symmetric_p(z)
    z = z[z != 0]
    if flips >= 0.5 or _one_size(np.abs(z)):  # of one size: the sign test
        return flips
    return max(flips, float(unseen_row_p(z[None])[0]))


def symmetric_p(z: Array) -> float:
    """The sign flips' alone, for zeros and sums below zero too."""
    z = z[z != 0]
    if not len(z) or not np.isfinite(z).all():
        return 1.0
    if z.sum() <= 0:
        return 1.0 - sign_flip_p(-z) if z.sum() < 0 else 0.5
    return sign_flip_p(z)


def sign_flip_p(z: Array) -> float:
    """P(sum of +-|z| >= sum of z) with fair signs. `z`: finite, none zero."""
    size = np.abs(z)
    if _one_size(size):
        return _binomial_tail(len(z), int((z > 0).sum()))
    if len(z) <= EXACT_ROWS:
        sums = np.zeros(1)
        for value in size:
            sums = np.concatenate([sums - value, sums + value])
        return float((sums >= z.sum() - 1e-9 * size.sum()).mean())
    return max(float(saddlepoint_p(z[None])[0]), 0.5 ** len(z))


def saddlepoint_p(z: Array) -> Array:
    """`sign_flip_p` of many rows at once: (tests, rows) -> (tests,), for sums above zero.

    The sum is lowered by the smallest |z|: half the step between two sums where they lie on a grid (whole numbers).
    """
    size = np.abs(z) / np.abs(z).max(axis=1, keepdims=True)  # (tests, rows)
    target = (z.sum(axis=1) - np.abs(z).min(axis=1)) / np.abs(z).max(axis=1)
    target = np.maximum(target, 1e-9)
    tilt = target / np.square(size).sum(axis=1)
    for _ in range(NEWTON_STEPS):
        tanh = np.tanh(tilt[:, None] * size)
        slope = (size * tanh).sum(axis=1)
        curvature = np.maximum(np.square(size).sum(axis=1) - np.square(size * tanh).sum(axis=1), 1e-300)
        step = tilt + (target - slope) / curvature
        tilt, before = np.clip(step, tilt / 3, tilt * 3), tilt
        if np.allclose(tilt, before, rtol=1e-9, atol=0):
            break
    scaled = tilt[:, None] * size
    log_cosh = (scaled + np.log1p(np.exp(-2 * scaled)) - math.log(2)).sum(axis=1)
    curvature = np.square(size / np.cosh(np.minimum(scaled, LARGE))).sum(axis=1)
    root = np.sqrt(np.maximum(2 * (tilt * target - log_cosh), 1e-12))
    ratio = np.maximum(tilt * np.sqrt(curvature) / root, 1e-12)
    return normal_tail(root + np.log(ratio) / root)


def unseen_row_p(z: Array) -> Array:
    """P(sum of E z <= 0), E standard exponential, with one more row, a loss: (tests, rows) -> (tests,).

    Gaffke's p-value for a mean above zero where no row can lose more than that one. It is larger than the largest |z|
    by six tenths, with many rows by less: the more there are, the more they say of the worst. By the same saddlepoint;
    0.5 where the sum with that row is not above zero.
    """
    worst = 1 + min(UNSEEN_MORE, UNSEEN_ROWS / z.shape[1])
    scaled = np.pad(z / np.abs(z).max(axis=1, keepdims=True), ((0, 0), (0, 1)), constant_values=-worst)
    low, high = np.zeros(len(z)), np.full(len(z), (1 - 1e-12) / worst)
    tilt = high / 2
    for _ in range(NEWTON_STEPS):
        terms = scaled / (1 + tilt[:, None] * scaled)
        slope = terms.sum(axis=1)  # falls in tilt; zero is looked for
        low, high = np.where(slope > 0, tilt, low), np.where(slope > 0, high, tilt)
        step = tilt + slope / np.square(terms).sum(axis=1)
        tilt, before = np.where((step > low) & (step < high), step, (low + high) / 2), tilt
        if np.allclose(tilt, before, rtol=1e-9, atol=0):
            break
    shrunk = 1 + tilt[:, None] * scaled  # (tests, rows + 1)
    root = np.sqrt(np.maximum(2 * np.log(shrunk).sum(axis=1), 1e-12))
    ratio = np.maximum(tilt * np.sqrt(np.square(scaled / shrunk).sum(axis=1)) / root, 1e-12)
    return np.where(scaled.sum(axis=1) > 0, normal_tail(root + np.log(ratio) / root), 0.5)


def interval(difference: Array, weight: Array, confidence: float) -> tuple[float, float]:
    """The ratios sum(difference) / sum(weight) that `p_value` does not refuse, each end at (1 - confidence) / 2."""
    level = (1 - confidence) / 2
    middle = float(difference.sum() / weight.sum())
    reach = 20 * standard_error(difference, weight) + 1e-12 * max(1.0, abs(middle))
    low = _crossing(lambda shift: p_value(difference - (middle - shift) * weight), level, reach)
    high = _crossing(lambda shift: p_value((middle + shift) * weight - difference), level, reach)
    return middle - low, middle + high


def gain_found(difference: Array, weight: Array, level: float, power: float) -> float:
    """The gain that rows which scatter as these do would prove at `level`, so often as `power` says."""
    middle, error = float(difference.sum() / weight.sum()), standard_error(difference, weight)
    reach = 40 * error + 1e-12 * max(1.0, abs(middle))
    least = _crossing(lambda shift: p_value(difference - (middle - shift) * weight), level, reach)
    return least + normal_quantile(1 - power) * error


def standard_error(difference: Array, weight: Array) -> float:
    """Of sum(difference) / sum(weight) with rows drawn whole (a ratio estimator, Cochran 1977, 6.4)."""
    rest = difference - difference.sum() / weight.sum() * weight
    spread = float(np.square(rest).sum() * len(rest) / max(1, len(rest) - 1))
    return math.sqrt(spread) / float(weight.sum())


def normal_tail(x: Array) -> Array:
    """P(Z > x), right to the last digits far out."""
    return np.array([0.5 * math.erfc(value / math.sqrt(2)) for value in np.atleast_1d(x)])


def normal_quantile(p: float) -> float:
    """The x with P(Z > x) = p."""
    return -_NORMAL.inv_cdf(p)


def _crossing(p_of_shift: Callable[[float], float], level: float, reach: float) -> float:
    """The shift at which p falls to `level`; infinity if none up to `reach` does (too few rows to say).

    Regula falsi (Illinois) on normal quantiles, which are nearly straight in the shift.
    """
    target = normal_quantile(level)

    def gap(shift: float) -> float:
        return normal_quantile(min(max(p_of_shift(shift), 1e-300), 1 - 1e-9)) - target

    low, high, below, above = 0.0, reach, gap(0.0), gap(reach)
    if above < 0:
        return math.inf
    for _ in range(SECANTS):
        middle = low + (high - low) * below / (below - above)
        here = gap(middle)
        if abs(here) < CLOSE:
            return middle
        if here < 0:
            low, below, above = middle, here, above / 2
        else:
            high, above, below = middle, here, below / 2
    return high


def _one_size(size: Array) -> bool:
    return bool(np.ptp(size) <= 1e-9 * size.max())


def _binomial_tail(n: int, wins: int) -> float:
    """P(Binomial(n, 1/2) >= wins): the sign test, McNemar's exact test for pairs of yes and no."""
    logs = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) for i in range(wins, n + 1)]
    return min(1.0, math.fsum(math.exp(value - n * math.log(2)) for value in logs))
