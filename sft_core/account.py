"""One account of the data from source rows to packed rows, with one bound.

In: the ledgers of normalize and pack. Out: what of the data is lost on the way, as one fraction that
`max_quarantined_fraction` of the recipe bounds. A step loses what it sets aside for a fault, in the unit of its ledger
in which that is most: a few long rows may hold most of the trained tokens. Two steps' losses are shares of what came to
each: of 4% and 3%, 1 - 0.96 * 0.97 = 6.9% is lost.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

from sft_core.errors import DataError

NO_FAULT = frozenset(
    {
        *("also_in_training", "left_out", "near_duplicate", "not_sampled", "repeated"),
        *("truncated", "split_border"),  # asked for by `pack.overlong`
    }
)
"""Reasons to set something aside that lose nothing which the recipe wants trained."""
COUNTED = {
    "normalize": {"rows": "rows"},
    "pack": {"rows": "conversations", "sequences": "sequences", "supervised_tokens": "trained tokens"},
}
"""Units that count, by step, and what they are called in messages."""
KEY = "max_quarantined_fraction"


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """What a step lost: `lost` of `entered` `unit`s, a reason each."""

    step: str
    unit: str
    lost: int
    entered: int
    reasons: Mapping[str, int] = field(default_factory=dict)

    @property
    def fraction(self) -> float:
        """0 to 1."""
        return self.lost / self.entered if self.entered else 0.0

    def __str__(self) -> str:
        return f"{self.lost:,} of {self.entered:,} {self.unit} ({self.fraction:.1%})"


def loss_of(step: str, ledger: Mapping[str, Mapping[str, Any]]) -> Loss:
    """What normalize or pack lost, in the unit in which it lost most. `ledger`: its manifest's."""
    found = []
    for unit, words in COUNTED[step].items():
        entry = ledger[unit]
        faults = {reason: count for reason, count in entry["set_aside"].items() if reason not in NO_FAULT}
        found.append(Loss(step=step, unit=words, lost=sum(faults.values()), entered=entry["in"], reasons=faults))
    return max(found, key=lambda loss: loss.fraction)


def lost_fraction(*losses: Loss) -> float:
    """The share of the data that several steps, one behind the other, lost."""
    return 1 - prod(1 - loss.fraction for loss in losses)


def is_over(allowed: float, *losses: Loss) -> bool:
    """Whether more is lost than `allowed`. One step's loss is compared exactly."""
    if len([loss for loss in losses if loss.lost]) == 1:
        return any(loss.lost > allowed * loss.entered for loss in losses)
    return lost_fraction(*losses) > allowed


def check_account(allowed: float, losses: tuple[Loss, ...], why: str, advice: str) -> None:
    """DataError if the recipe allows less than what is lost. `why`: the last step's reasons; `advice`: what to do."""
    if not is_over(allowed, *losses):
        return
    *before, last = losses
    earlier = "".join(
        f", after {loss} in {loss.step}: {lost_fraction(*losses):.1%} is lost" for loss in before if loss.lost
    )
    verb = "cannot be used" if last.step == "normalize" else "are set aside"
    raise DataError(f"{last} {verb}{earlier}; {KEY} allows {allowed:.1%}{why}\n{advice}, or raise {KEY}")


def account_line(allowed: float, *losses: Loss) -> str | None:
    """The whole account in one line; None if nothing is lost."""
    if not any(loss.lost for loss in losses):
        return None
    parts = "; ".join(f"{loss.step} {loss}" for loss in losses if loss.lost)
    return f"of the data {lost_fraction(*losses):.1%} is lost ({parts}); {KEY} allows {allowed:.1%}"


def check_conserved(came: int, entered: int) -> None:
    """Our own invariant: pack reads every conversation that normalize wrote to train on."""
    assert came == entered, f"pack: {entered} conversations read, {came} were written by normalize"
