"""The same held-out rows under two models: paired differences, tested.

In: two reports, a metric, the terms of the gate. Out: `Comparison`. The estimand is the metric as evaluate reports it,
a ratio of sums over rows (loss: nats of all rows by tokens of all rows), with rows drawn whole: tokens of one row are
no independent draws. `z` is linear in the sums, so testing the ratio is testing a mean of rows.
"""

from collections.abc import Set
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from sft_core.errors import DataError
from sft_core.evaluate.report import METRICS, EvaluationReport, Score
from sft_core.register.spending import CHALLENGES_A_YEAR, level_of, rows_needed
from sft_core.register.statistics import gain_found, interval, p_value

TOKEN_METRICS = frozenset({"loss", "token_accuracy"})
"""Mean nothing across tokenizers or templates."""
SHARES = frozenset({"token_accuracy", "exact_match", "rouge_l", "tool_calls"})
"""Between 0 and 1."""
CONFIDENCE = 0.95
POWER = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What the gate asks for: the sections `evaluate` and `register`, and which challenge of this champion it is."""

    primary_metric: str = "loss"
    alpha: float = 0.05
    margin: float = 0.0
    slice_margin: float = 0.02
    challenge: int = 1
    challenges_a_year: int = CHALLENGES_A_YEAR

    @property
    def level(self) -> float:
        """Of this one test."""
        return level_of(self.challenge, self.alpha, self.challenges_a_year)


@dataclass(frozen=True, slots=True, eq=False)
class Paired:
    """Rows that both models were scored on: metric sums and weight of each, (rows,)."""

    metric: str
    scores: tuple[Score, ...]
    tuned: NDArray[np.float64]
    other: NDArray[np.float64]
    weight: NDArray[np.float64]

    @property
    def gain(self) -> NDArray[np.float64]:
        """Positive where the tuned model did better."""
        with np.errstate(invalid="ignore"):
            return self.other - self.tuned if METRICS[self.metric].lower_is_better else self.tuned - self.other

    def shifted(self, margin: float) -> NDArray[np.float64]:
        """z: its mean is above zero if the gain is above `margin` (a fraction of the other's loss, or points)."""
        with np.errstate(invalid="ignore"):  # losses that are not finite: p_value refuses them
            return self.gain - margin * (np.abs(self.other) if METRICS[self.metric].lower_is_better else self.weight)

    def only(self, chosen: NDArray[np.bool_]) -> "Paired":
        """Some of the rows."""
        scores = tuple(score for score, here in zip(self.scores, chosen, strict=True) if here)
        return Paired(self.metric, scores, self.tuned[chosen], self.other[chosen], self.weight[chosen])

    def interval(self) -> tuple[float, float]:
        """The 95 % interval of `mean_gain`, within what the metric can be; infinite where a value is not finite."""
        if not np.isfinite(self.gain).all():
            return -np.inf, np.inf
        low, high = interval(self.gain, self.weight, CONFIDENCE)
        if METRICS[self.metric].lower_is_better:
            return low, min(high, float(self.other.sum() / self.weight.sum()))  # no loss is below zero
        return (max(low, -1.0), min(high, 1.0)) if self.metric in SHARES else (low, high)

    @property
    def mean_gain(self) -> float:
        """In the metric's unit."""
        return float(self.gain.sum() / self.weight.sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The tuned model against another one. `low` to `high` is the 95 % interval of `gain`, in the metric's unit."""

    against: str
    metric: str
    rows: int
    excluded: int
    tuned: float
    other: float
    gain: float
    low: float
    high: float
    p: float
    level: float
    detectable: float
    notes: tuple[str, ...] = ()

    @property
    def tuned_is_better(self) -> bool:
        """By more than the margin, and surely enough for this challenge."""
        return self.p <= self.level

    @property
    def words(self) -> str:
        """For people."""
        verb = "beats" if self.tuned_is_better else "does not beat"
        figures = f"{self.metric} {self.tuned:.4f} against {self.other:.4f} on {self.rows} rows"
        sure = f"p = {self.p:.2g}, {self.level:.2g} needed"
        return f"{verb} the {self.against}: {figures} ({sure})"


def pair(tuned: EvaluationReport, other: EvaluationReport, metric: str, trained_on: Set[str]) -> Paired:
    """Rows in both reports that have the metric and that no model judged was trained on. DataError if there are none.

    Where a row's ids differ (another tokenizer or template) token metrics give way to bits a byte.
    """
    by_id = {score.row_id: score for score in other.scores}
    both = [(s, by_id[s.row_id]) for s in tuned.scores if s.row_id in by_id]
    if not both:
        raise DataError("the two reports share no held-out row; evaluate both models on the same conversations again")
    rows = [(mine, theirs) for mine, theirs in both if mine.row_id not in trained_on]
    if not rows:
        raise DataError(
            f"all {len(both)} held-out rows were training rows of a model that is judged, or of its ancestors; "
            "hold out others (eval_datasets)"
        )
    if metric in TOKEN_METRICS and any(mine.encoding != theirs.encoding for mine, theirs in rows):
        metric = "bits_per_byte"
    value, weight = METRICS[metric].value, METRICS[metric].weight
    read = [(mine, value(mine), value(theirs)) for mine, theirs in rows]
    scored = [(mine, a, b) for mine, a, b in read if a is not None and b is not None and weight(mine) > 0]
    if not scored:
        raise DataError(f"evaluate.primary_metric {metric}: not in the report; set evaluate.max_generated_rows above 0")
    columns = np.array([(a, b, weight(mine)) for mine, a, b in scored], dtype=np.float64)  # (rows, 3)
    return Paired(metric, tuple(mine for mine, _, _ in scored), *columns.T)


def compare(against: str, paired: Paired, excluded: int, terms: Terms) -> Comparison:
    """Test that the tuned model is better by more than the margin."""
    metric, total = METRICS[paired.metric], float(paired.weight.sum())
    finite = bool(np.isfinite(paired.gain).all())
    low, high = paired.interval()
    other = float(paired.other.sum() / total)
    detectable = gain_found(paired.gain, paired.weight, terms.level, POWER) if finite else np.inf
    margin = terms.margin * (abs(other) if metric.lower_is_better else 1.0)
    comparison = Comparison(
        against=against,
        metric=paired.metric,
        rows=len(paired.scores),
        excluded=excluded,
        tuned=float(paired.tuned.sum() / total),
        other=other,
        gain=paired.mean_gain,
        low=low,
        high=high,
        p=p_value(paired.shifted(terms.margin)),
        level=terms.level,
        detectable=detectable + margin,
    )
    return _with_notes(comparison, finite, terms)


def _with_notes(comparison: Comparison, finite: bool, terms: Terms) -> Comparison:
    notes = []
    if comparison.metric != terms.primary_metric:
        notes.append(
            f"the tuned model and the {comparison.against} read by different tokenizers or templates: "
            f"{comparison.metric} stands in for {terms.primary_metric}"
        )
    if comparison.excluded:
        notes.append(
            f"{comparison.excluded} held-out rows left out: a model judged, or its ancestor, was trained on them"
        )
    if not finite:
        notes.append(f"{comparison.metric} is not finite on some rows")
    needed = rows_needed(comparison.level)
    if comparison.rows < needed:
        notes.append(
            f"{comparison.rows} held-out rows can never pass: at {comparison.level:.2g} at least {needed} are needed, "
            "and then each of them must be better; raise eval_fraction or add eval_datasets"
        )
    elif not comparison.tuned_is_better and comparison.detectable == np.inf and finite:
        notes.append(
            f"{comparison.rows} held-out rows as uneven as these prove no gain at {comparison.level:.2g}, however "
            "large; raise eval_fraction or add eval_datasets"
        )
    elif not comparison.tuned_is_better and finite:
        notes.append(
            f"against the {comparison.against} {comparison.rows} rows find a gain in {comparison.metric} of "
            f"{comparison.detectable:.3g} four times in five"
        )
    return replace(comparison, notes=tuple(notes))
