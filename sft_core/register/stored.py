"""The gate on what a retraining left in the store.

In: a `Retraining`, whether there is a champion, how often that one was challenged. Out: `Judged`: the verdict and its
page. DataError if a sentinel says that this model must not be registered. Knows nothing of the registry.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from sft_core.evaluate import EvaluationReport, read_report
from sft_core.recipe import Recipe
from sft_core.register.comparison import Terms
from sft_core.register.endings import endings_words, unfinished_answers
from sft_core.register.judge import Verdict, judge
from sft_core.register.page import Material, render_page
from sft_core.register.sentinels import (
    Finding,
    broken_adapter,
    certificate_over_bound,
    evaluation_rows_in_training,
    no_supervised_tokens,
    read_row_ids,
    refuse,
    strange_scores,
)
from sft_core.steps import Retraining
from sft_core.train.metrics import read_metrics


@dataclass(frozen=True, slots=True)
class Judged:
    """A verdict and the HTML page that explains it."""

    verdict: Verdict
    page: str


def judge_stored(run: Retraining, challenge: int, *, against_champion: bool, trained_on: Iterable[str] = ()) -> Judged:
    """Sentinels, then the gate, then the page. `trained_on`: row_ids that the champion or an ancestor learned from."""
    names = ("tuned", "base", "champion") if against_champion else ("tuned", "base")
    reports = {name: read_report(run.folder(f"evaluate/{name}")) for name in names}
    refuse(_findings(run, reports))
    verdict = judge(
        reports["tuned"], reports["base"], reports.get("champion"), terms_of(run.recipe, challenge), trained_on
    )
    ended = endings_words(reports, run.recipe.evaluate.max_new_tokens)
    manual = run.recipe.register_.approval == "manual"
    verdict = replace(verdict, manual=manual, notes=(*verdict.notes, ended))
    moving = [key for key in run.plan.steps if key.startswith("fetch/")] + ["normalize", "pack", "evaluate/tuned"]
    material = Material(
        title=f"{run.recipe.model_name} {run.plan['merge'].fingerprint[:12]}",
        verdict=verdict,
        reports=reports,
        training=read_metrics(run.folder("train") / "metrics.jsonl"),
        ledgers={key: run.manifest(key).ledger for key in moving},
    )
    return Judged(verdict, render_page(material))


def terms_of(recipe: Recipe, challenge: int) -> Terms:
    """From the sections `evaluate` and `register`."""
    return Terms(
        primary_metric=recipe.evaluate.primary_metric,
        alpha=recipe.register_.alpha,
        margin=recipe.register_.margin,
        slice_margin=recipe.register_.slice_margin,
        challenge=challenge,
        challenges_a_year=recipe.register_.challenges_a_year,
    )


def _findings(run: Retraining, reports: dict[str, EvaluationReport]) -> Iterator[Finding]:
    merge_facts = run.manifest("merge").facts
    convert_facts = run.manifest("convert").facts if "convert" in run.plan.steps else {}
    conversations = run.folder("normalize")
    yield from no_supervised_tokens(run.manifest("pack").ledger)
    yield from broken_adapter(convert_facts, merge_facts)
    yield from certificate_over_bound(merge_facts, run.recipe.register_.max_merge_divergence)
    yield from evaluation_rows_in_training(read_row_ids(conversations, "train"), read_row_ids(conversations, "heldout"))
    yield from strange_scores(reports["tuned"], reports["base"])
    limit = run.recipe.evaluate.max_new_tokens
    yield from unfinished_answers(reports, limit, run.recipe.register_.max_unfinished_increase)
