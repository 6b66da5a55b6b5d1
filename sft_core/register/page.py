"""The page that explains a verdict: one HTML file that needs no network.

In: `Material`: the verdict, the reports, training metrics, ledgers. Out: HTML text. Everything that comes from rows or
models is escaped (Jinja2's autoescape); charts are inline SVG; the page's policy forbids scripts and loading.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from jinja2 import Environment, StrictUndefined

from sft_core.evaluate.report import METRICS, EvaluationReport, Score
from sft_core.register.charts import Interval, Point, interval_chart, line_chart
from sft_core.register.judge import Verdict
from sft_core.register.page_text import PAGE

SAMPLES = 20
SMOOTHED = 1 / 30
"""Of the logged steps: how many a smoothed training loss is the mean of."""
SAMPLE_CHARACTERS = 2000
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff]")
"""Control characters and halves of surrogate pairs: no text of HTML."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Material:
    """What a page is made of. `reports` by model: tuned, base and, if there is one, champion; `ledgers` by step."""

    title: str
    verdict: Verdict
    reports: Mapping[str, EvaluationReport]
    training: Sequence[Mapping[str, Any]] = ()
    ledgers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Sample:
    """One held-out row, answered by each model."""

    prompt: str
    reference: str
    answers: tuple[tuple[str, str | None, bool | None], ...]


def render_page(material: Material) -> str:
    """The page. Equal material gives equal text."""
    verdict = material.verdict
    page = (
        _environment()
        .from_string(PAGE)
        .render(
            title=material.title,
            verdict=verdict,
            passed="Passed the gate: a person decides." if verdict.manual else "Promoted.",
            metrics=_metrics(material.reports),
            models=list(material.reports),
            curve=line_chart(_losses(material.training), "optimizer step", "loss, nats a supervised token"),
            differences=[
                interval_chart(
                    [Interval(f"against the {c.against}", c.gain, c.low, c.high, c.tuned_is_better)], _unit(c.metric)
                )
                for c in verdict.comparisons
            ],
            slices=interval_chart(
                [Interval(f"{s.name} ({s.rows})"[:48], s.gain, s.low, s.high, not s.blocks) for s in verdict.slices],
                _unit(verdict.comparisons[-1].metric),
            ),
            samples=_samples(material.reports),
            ledgers=_ledgers(material.ledgers),
        )
    )
    return UNPRINTABLE.sub("\ufffd", page)


def _environment() -> Environment:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["short"] = lambda text: (
        text if len(text) <= SAMPLE_CHARACTERS else f"{text[:SAMPLE_CHARACTERS]} [{len(text)} characters]"
    )
    environment.filters["figure"] = lambda value: "" if value is None else f"{value:.5g}"
    return environment


def _losses(training: Sequence[Mapping[str, Any]]) -> dict[str, list[Point]]:
    """Training loss as logged, its mean over SMOOTHED of the run, and the held-out loss where it was measured."""
    logged = [(float(entry["optimizer_step"]), float(entry["loss"])) for entry in training]
    held_out = [(float(e["optimizer_step"]), float(e["eval_loss"])) for e in training if "eval_loss" in e]
    width = max(1, int(len(logged) * SMOOTHED))
    mean = [
        (logged[end][0], fmean(loss for _, loss in logged[max(0, end + 1 - width) : end + 1]))
        for end in range(len(logged))
    ]
    smoothed = f"training, mean of {width}" if width > 1 else "training"
    return {"training, as logged": logged if width > 1 else [], smoothed: mean, "held out": held_out}


def _unit(metric: str) -> str:
    return f"gain in {metric} ({METRICS[metric].unit}), 95 % interval"


def _metrics(reports: Mapping[str, EvaluationReport]) -> list[tuple[str, list[float | None]]]:
    """One line a metric, one column a model."""
    figures = [report.metrics() | report.harness for report in reports.values()]
    names = dict.fromkeys(name for column in figures for name in column)
    return [(name, [column.get(name) for column in figures]) for name in names]


def _samples(reports: Mapping[str, EvaluationReport]) -> list[Sample]:
    """Answered rows, those first where the tuned model changed most for good or bad, by token loss against the last."""
    by_model = {name: {score.row_id: score for score in report.scores} for name, report in reports.items()}
    last = by_model[list(by_model)[-1]]
    answered = [score for score in by_model["tuned"].values() if score.answer is not None and score.row_id in last]
    answered.sort(key=lambda score: (_change(score, last[score.row_id]), score.row_id))
    half = SAMPLES // 2
    chosen = answered if len(answered) <= SAMPLES else answered[:half] + answered[-half:]
    return [
        Sample(
            score.prompt,
            score.reference,
            tuple((name, *_answer(rows.get(score.row_id))) for name, rows in by_model.items()),
        )
        for score in chosen
    ]


def _change(mine: Score, theirs: Score) -> float:
    """Bits a byte gained over the other model; worst first."""
    return (theirs.loss_sum - mine.loss_sum) / max(1, mine.num_bytes)


def _answer(score: Score | None) -> tuple[str | None, bool | None]:
    return (score.answer, score.exact_match) if score is not None else (None, None)


def _ledgers(ledgers: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str, int, int, list[tuple[str, int]]]]:
    """step, unit, in, out, (reason, count) by size."""
    return [
        (
            step,
            unit,
            entry["in"],
            entry["out"],
            sorted(entry["set_aside"].items(), key=lambda pair: (-pair[1], pair[0])),
        )
        for step, ledger in ledgers.items()
        for unit, entry in ledger.items()
    ]
