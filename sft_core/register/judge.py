"""Register's decision, as a pure function: reports of tuned, base and champion -> verdict (the registry is elsewhere).

The tuned model takes the alias `champion` only if it is surely better than the base and than the champion on the same
held-out rows, and no worse on any slice of them; a tie keeps the champion. Reasons: docs/adr/0007-gate.md.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from sft_core.evaluate.report import EvaluationReport
from sft_core.register.comparison import Comparison, Terms, compare, pair
from sft_core.register.slices import SliceResult, judge_slices


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether the tuned model becomes champion, and why. The slices are those of the last comparison."""

    promote: bool
    comparisons: tuple[Comparison, ...]
    slices: tuple[SliceResult, ...] = ()
    notes: tuple[str, ...] = ()
    manual: bool = False
    """`register.approval`: a person decides on what passes."""

    @property
    def words(self) -> str:
        """One sentence for the registry."""
        blocking = [result.words for result in self.slices if result.blocks]
        reasons = [comparison.words for comparison in self.comparisons] + blocking + list(self.notes)
        passed = "passed the gate" if self.manual else "promoted"
        return f"{passed if self.promote else 'not promoted'}: {'; '.join(reasons)}"

    def as_dict(self) -> dict[str, Any]:
        """Plain dict with the words."""
        return {**asdict(self), "words": self.words}


def judge(
    tuned: EvaluationReport,
    base: EvaluationReport,
    champion: EvaluationReport | None,
    terms: Terms,
    trained_on: Iterable[str] = (),
) -> Verdict:
    """Compare on the rows that reports share, less those of `trained_on` (row_ids). DataError if none is left.

    Without a champion the base stands in for it; slices are held against the champion, else against the base.
    """
    excluded_ids = frozenset(trained_on)
    held_out = {score.row_id for score in tuned.scores}
    excluded = len(held_out & excluded_ids)
    others = {"base": base} if champion is None else {"base": base, "champion": champion}
    comparisons: list[Comparison] = []
    slices: tuple[SliceResult, ...] = ()
    for name, other in others.items():
        paired = pair(tuned, other, terms.primary_metric, excluded_ids)
        comparisons.append(compare(name, paired, excluded, terms))
        slices = judge_slices(paired, terms.slice_margin)
    better = all(comparison.tuned_is_better for comparison in comparisons)
    notes = dict.fromkeys(note for comparison in comparisons for note in comparison.notes)
    if terms.challenge > 1 and not better:
        notes[f"challenge {terms.challenge} of this {list(others)[-1]}: each one asks for more certainty"] = None
    promote = better and not any(result.blocks for result in slices)
    return Verdict(promote, tuple(comparisons), slices, tuple(notes))
