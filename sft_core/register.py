"""Register's decision, as a pure function: reports of tuned, base and champion -> verdict (the registry is elsewhere).

The tuned model takes the alias `champion` only if it is strictly better than the base and than the champion on the
same held-out conversations; a tie keeps the champion.
"""

from dataclasses import asdict, dataclass
from typing import Any

from sft_core.errors import DataError
from sft_core.evaluate.report import EvaluationReport

LOWER_IS_BETTER = frozenset({"loss"})


@dataclass(frozen=True, slots=True)
class Comparison:
    """The primary metric of the tuned model and of another one, on the same rows."""

    against: str
    metric: str
    rows: int
    tuned: float
    other: float

    @property
    def tuned_is_better(self) -> bool:
        """Strictly."""
        return self.tuned < self.other if self.metric in LOWER_IS_BETTER else self.tuned > self.other

    @property
    def words(self) -> str:
        """For people."""
        verb = "beats" if self.tuned_is_better else "does not beat"
        return f"{verb} the {self.against}: {self.metric} {self.tuned:.4f} against {self.other:.4f} on {self.rows} rows"


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether the tuned model becomes champion, and why."""

    promote: bool
    comparisons: tuple[Comparison, ...]

    @property
    def words(self) -> str:
        """One sentence for the registry."""
        return ("promoted: " if self.promote else "not promoted: ") + "; ".join(c.words for c in self.comparisons)

    def as_dict(self) -> dict[str, Any]:
        """Plain dict with the words."""
        return {**asdict(self), "words": self.words}


def judge(
    tuned: EvaluationReport, base: EvaluationReport, champion: EvaluationReport | None, primary_metric: str
) -> Verdict:
    """Compare on the rows that all reports share. DataError if they share none, or one lacks the metric."""
    comparisons = [_compare("base", tuned, base, primary_metric)]
    if champion is not None:
        comparisons.append(_compare("champion", tuned, champion, primary_metric))
    return Verdict(all(c.tuned_is_better for c in comparisons), tuple(comparisons))


def _compare(against: str, tuned: EvaluationReport, other: EvaluationReport, metric: str) -> Comparison:
    shared = {s.row_id for s in tuned.scores} & {s.row_id for s in other.scores}
    if not shared:
        raise DataError(f"the reports of the tuned model and the {against} share no held-out row; evaluate both again")
    values = []
    for report in (tuned, other):
        metrics = EvaluationReport(tuple(s for s in report.scores if s.row_id in shared)).metrics()
        if metric not in metrics:
            raise DataError(
                f"evaluate.primary_metric {metric}: not in the report; set evaluate.max_generated_rows above 0"
            )
        values.append(metrics[metric])
    return Comparison(against, metric, len(shared), *values)
