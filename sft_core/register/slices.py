"""No worse on any part of the held-out rows: non-inferiority by data set, by length, by tag.

In: paired rows. Out: one `SliceResult` a slice. Two questions, since one slice cannot answer the other's:

- A slice large enough that an equally good model would nearly always prove it (all such slices together at least 95 %)
  must prove it: worse by the margin or more is refused at 5 %. All must pass, so no test needs a stricter level.
- A smaller slice cannot prove it of any model. It stops a promotion only if it is shown to be worse by more than the
  margin, at 5 % for all slices together (Bonferroni).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sft_core.evaluate.report import METRICS, Score
from sft_core.register.comparison import Paired
from sft_core.register.statistics import gain_found, p_value, symmetric_p

MIN_ROWS = 20
"""Smaller slices are shown and not judged."""
LEVEL = 0.05
Outcome = Literal["held", "open", "unproved", "worse", "small"]
BLOCKS: frozenset[Outcome] = frozenset({"unproved", "worse"})
WORDS: dict[Outcome, str] = {
    "held": "no worse",
    "open": "too few rows to prove it no worse, and not shown to be worse",
    "unproved": "not proved to be no worse, with rows enough to prove it",
    "worse": "worse by more than the margin",
    "small": f"fewer than {MIN_ROWS} rows, not judged",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SliceResult:
    """One slice. `low` to `high` is the 95 % interval of `gain`; `margin` in the metric's unit."""

    name: str
    rows: int
    gain: float
    low: float
    high: float
    margin: float
    outcome: Outcome

    @property
    def blocks(self) -> bool:
        """Whether it keeps the champion."""
        return self.outcome in BLOCKS

    @property
    def words(self) -> str:
        """For people."""
        gain, low, high = (f"{round(value, 4) + 0.0:+.4f}" for value in (self.gain, self.low, self.high))  # no -0.0
        figures = f"gain {gain}, {low} to {high}, margin {self.margin:.4f}"
        return f"slice {self.name} ({self.rows} rows): {WORDS[self.outcome]} ({figures})"


def judge_slices(paired: Paired, margin: float) -> tuple[SliceResult, ...]:
    """Every slice, in order."""
    parts = {name: paired.only(chosen) for name, chosen in slices_of(paired.scores)}
    judged = sum(len(part.scores) >= MIN_ROWS for part in parts.values())
    return tuple(_judge(name, part, margin, LEVEL / max(1, judged)) for name, part in parts.items())


def slices_of(scores: tuple[Score, ...]) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """Names and rows of the slices that are neither empty nor everything."""
    datasets = np.array([score.dataset for score in scores])
    for name in sorted(set(datasets.tolist())):
        if (datasets != name).any():
            yield f"data set {name}", datasets == name
    sizes = np.array([score.num_bytes for score in scores])
    third, two_thirds = np.quantile(sizes, [1 / 3, 2 / 3], method="lower")
    thirds = {
        f"answers up to {third} bytes": sizes <= third,
        f"answers of {third + 1} to {two_thirds} bytes": (sizes > third) & (sizes <= two_thirds),
        f"answers over {two_thirds} bytes": sizes > two_thirds,
    }
    yield from ((name, chosen) for name, chosen in thirds.items() if chosen.any() and not chosen.all())
    for tag in sorted({tag for score in scores for tag in score.tags}):
        chosen = np.array([tag in score.tags for score in scores])
        if not chosen.all():
            yield f"tag {tag}", chosen


def _judge(name: str, part: Paired, margin: float, shared_level: float) -> SliceResult:
    relative = METRICS[part.metric].lower_is_better
    unit = abs(float(part.other.sum() / part.weight.sum())) if relative else 1.0
    finite = bool(np.isfinite(part.gain).all())
    low, high = part.interval()
    proved = p_value(part.shifted(-margin)) <= LEVEL
    harmed = symmetric_p(-part.shifted(-margin)) <= shared_level  # the keener test: in doubt the champion stays
    large = not finite or margin * unit >= gain_found(part.gain, part.weight, LEVEL, 1 - shared_level)
    outcome: Outcome = "small"
    if len(part.scores) >= MIN_ROWS:
        outcome = "held" if proved else "worse" if harmed else "unproved" if large else "open"
    return SliceResult(
        name=name,
        rows=len(part.scores),
        gain=part.mean_gain,
        low=low,
        high=high,
        margin=margin * unit,
        outcome=outcome,
    )
