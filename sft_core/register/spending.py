"""How sure the gate must be, the more often one champion was challenged (alpha spending, Lan & DeMets 1983).

In: which challenge of this champion it is, alpha, how many challenges alpha is for. Out: the level of this one test.
See docs/adr/0007-gate.md.
"""

import math

CHALLENGES_A_YEAR = 365


def level_of(challenge: int, alpha: float, a_year: int = CHALLENGES_A_YEAR) -> float:
    """Half of alpha falls off as 1/k^2, half is spread evenly: any `a_year` challenges in a row cost at most alpha.

    The sum bounds the chance of a false promotion whatever ties the nights together (same rows, same champion).

    >>> [round(level_of(k, 0.05), 6) for k in (1, 2, 10, 100, 365)]
    [0.015267, 0.003868, 0.00022, 7e-05, 6.9e-05]
    """
    assert challenge >= 1, f"challenges are counted from 1, not {challenge}"
    first = 6 / (math.pi * challenge) ** 2
    return alpha / 2 * (first + 1 / a_year)


def rows_needed(level: float) -> int:
    """The fewest rows with which a test can pass: all of them better, each sign a fair coin.

    >>> rows_needed(0.015), rows_needed(0.00007)
    (7, 14)
    """
    return math.ceil(-math.log2(level))
