"""Do the answers end? A model that never writes its stop token may have the best loss of all, and is of no use.

In: the reports of tuned, base and champion. Out: a `Finding` that refuses the tuned model, and words for the verdict.

An answer should have ended where its reference takes at most half of `evaluate.max_new_tokens`. Of those answers the
tuned model may leave unfinished as many as the better of base and champion, and `register.max_unfinished_increase`
more, but never most of them. A base model that does not chat ends none of its answers: it is no measure, and where
nothing else is one, the increase alone is allowed. The count is tested (exact binomial, at LEVEL), so that a few
answers refuse nothing by chance. Reasons: docs/adr/0007-gate.md.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from sft_core.evaluate.report import EvaluationReport
from sft_core.register.sentinels import Finding

SHORT = 0.5
"""Of `max_new_tokens`: references up to here leave an answer room enough to end."""
MOST_UNFINISHED = 0.5
"""No more than so many may be unfinished, whatever the others do."""
NO_MEASURE = 0.9
"""A model that leaves more unfinished does not chat."""
LEVEL = 0.01


@dataclass(frozen=True, slots=True)
class Endings:
    """Answers that should have ended, and how many of them did not."""

    answers: int
    unfinished: int

    @property
    def share(self) -> float:
        """Unfinished, 0 to 1."""
        return self.unfinished / self.answers


def endings_of(report: EvaluationReport, max_new_tokens: int) -> Endings:
    """Of the generated answers whose reference is short. Reports of earlier versions do not say, and count none."""
    should = [
        score
        for score in report.scores
        if score.ended is not None and (score.reference_tokens or math.inf) <= SHORT * max_new_tokens
    ]
    return Endings(len(should), sum(not score.ended for score in should))


def unfinished_answers(
    reports: Mapping[str, EvaluationReport], max_new_tokens: int, max_increase: float
) -> list[Finding]:
    """`reports` by model: tuned, base and, if there is one, champion. `max_increase` in points, 0 to 1."""
    found = {name: endings_of(report, max_new_tokens) for name, report in reports.items()}
    tuned = found.pop("tuned")
    others = {name: endings for name, endings in found.items() if endings.answers}
    if not tuned.answers:
        return []
    best = min((e.share for e in others.values() if e.share <= NO_MEASURE), default=0.0)
    allowed = min(best + max_increase, max(MOST_UNFINISHED, max_increase))
    if binomial_tail(tuned.unfinished, tuned.answers, allowed) > LEVEL:
        return []
    compared = "".join(f", of the {name}'s {e.unfinished} of {e.answers}" for name, e in others.items())
    return [
        Finding(
            "answers_do_not_end",
            f"{tuned.unfinished} of {tuned.answers} answers of the tuned model do not end within "
            f"evaluate.max_new_tokens {max_new_tokens}, though their references take half of that at most{compared}; "
            f"{allowed:.0%} may. If the base never learned to write the stop token, set "
            "train.lora.trainable_tokens to it (the log of pack names such tokens); register.max_unfinished_increase "
            f"({max_increase:g}) is the bound",
        )
    ]


def endings_words(reports: Mapping[str, EvaluationReport], max_new_tokens: int) -> str:
    """For the verdict: how many answers of each model ended, and whether that could be judged."""
    counts = {name: ended_of(report) for name, report in reports.items()}
    said = ", ".join(f"{name} {words}" for name, words in counts.items() if words)
    if not said:
        return "whether answers end is not judged: none was generated (evaluate.max_generated_rows)"
    words = f"answers that ended by themselves: {said}"
    if endings_of(reports["tuned"], max_new_tokens).answers:
        return words
    return (
        f"{words} (not judged: every reference takes more than half of evaluate.max_new_tokens {max_new_tokens}, which "
        "may be too short)"
    )


def ended_of(report: EvaluationReport) -> str:
    """`70 of 72`; empty where no answer was generated, or the report is of an earlier version."""
    known = [score.ended for score in report.scores if score.ended is not None]
    return f"{sum(known)} of {len(known)}" if known else ""


def binomial_tail(count: int, trials: int, chance: float) -> float:
    """P(at least `count` of `trials`), each with `chance`.

    >>> round(binomial_tail(8, 10, 0.5), 6), binomial_tail(0, 3, 0.1), binomial_tail(3, 3, 1.0)
    (0.054688, 1.0, 1.0)
    """
    if count <= 0 or chance >= 1:
        return 1.0
    if chance <= 0:
        return 0.0
    log_chance, log_rest, log_all = math.log(chance), math.log1p(-chance), math.lgamma(trials + 1)
    return min(
        1.0,
        math.fsum(
            math.exp(
                log_all - math.lgamma(k + 1) - math.lgamma(trials - k + 1) + k * log_chance + (trials - k) * log_rest
            )
            for k in range(count, trials + 1)
        ),
    )
