"""Is the mean above zero? One-sided p-values for paired differences, exact for few rows, smooth for many.

In: z, one number a held-out row, positive where the tuned model did better. Out: the chance of such a sum if the models
were equally good. Two tests, and the larger p-value counts:

- sign flips (Fisher 1935): if two equally good models may change names, every sign of z is a fair coin. Exact for any
  tails and any number of rows; counted out up to EXACT_ROWS, above by a saddlepoint (Lugannani & Rice 1980, in
  Barndorff-Nielsen's form), which is good at 1e-7, where drawing flips at random would see none.
- empirical likelihood (Owen 1988): weighs skewness. Many small gains paid for by a few large losses look too certain
  to the first test; to this one they do not.

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
HALVINGS = 45
BISECTIONS = 16
"""Of 20 standard errors: an interval's ends are right to a thousandth of one."""
LARGE = 300.0
"""cosh overflows a little above 700."""
_NORMAL = NormalDist()


def p_value(z: Array) -> float:
    """The larger of both p-values; 1.0 where a value is not finite or none differs from zero.

    >>> p_value(np.array([1.0, 1, 1, 1, 1])) == 1 / 32
    True
    """
    z = z[z != 0]
    if not len(z) or not np.isfinite(z).all():
        return 1.0
    if z.sum() <= 0:
        return 1.0 - sign_flip_p(-z) if z.sum() < 0 else 0.5
    return max(sign_flip_p(z), float(likelihood_p(z[None])[0]))


def sign_flip_p(z: Array) -> float:
    """P(sum of +-|z| >= sum of z) with fair signs. `z`: finite, none zero."""
    size = np.abs(z)
    if np.ptp(size) <= 1e-9 * size.max():
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


def likelihood_p(z: Array) -> Array:
    """Signed root of the empirical likelihood ratio for a mean of zero: (tests, rows) -> (tests,), sums above zero.

    Zero where no row is negative: then nothing but the sign flips can say how sure that is.
    """
    scaled = z / np.abs(z).max(axis=1, keepdims=True)
    worst = -scaled.min(axis=1)  # (tests,)
    low, high = np.zeros(len(z)), (1 - 1e-12) / np.maximum(worst, 1e-9)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        rising = (scaled / (1 + middle[:, None] * scaled)).sum(axis=1) > 0
        low, high = np.where(rising, middle, low), np.where(rising, high, middle)
    ratio = np.log1p(low[:, None] * scaled).sum(axis=1)
    return np.where(worst <= 0, 0.0, normal_tail(np.sqrt(2 * np.maximum(ratio, 0))))


def interval(difference: Array, weight: Array, confidence: float) -> tuple[float, float]:
    """The ratios sum(difference) / sum(weight) that `p_value` does not refuse, each end at (1 - confidence) / 2."""
    level = (1 - confidence) / 2
    middle = float(difference.sum() / weight.sum())
    reach = 20 * standard_error(difference, weight) + 1e-12 * max(1.0, abs(middle))
    low = _crossing(lambda shift: p_value(difference - (middle - shift) * weight), level, reach)
    high = _crossing(lambda shift: p_value((middle + shift) * weight - difference), level, reach)
    return middle - low, middle + high


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
    """The shift at which p falls to `level`; `reach` if it never does (too few rows to say)."""
    low, high = 0.0, reach
    if p_of_shift(high) > level:
        return math.inf
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if p_of_shift(middle) > level else (low, middle)
    return high


def _binomial_tail(n: int, wins: int) -> float:
    """P(Binomial(n, 1/2) >= wins): the sign test, McNemar's exact test for pairs of yes and no."""
    logs = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) for i in range(wins, n + 1)]
    return min(1.0, math.fsum(math.exp(value - n * math.log(2)) for value in logs))
