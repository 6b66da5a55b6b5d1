"""What evaluate writes: `scores.parquet`, a row a held-out conversation, and `report.json`: sums and identity."""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

SCORES = "scores.parquet"
REPORT = "report.json"
SAMPLES = 5
SCHEMA = pa.schema(
    [
        ("row_id", pa.string()),
        ("dataset", pa.string()),
        ("tags", pa.list_(pa.string())),
        ("encoding", pa.string()),
        ("tokens", pa.int64()),
        ("correct_tokens", pa.int64()),
        ("loss_sum", pa.float64()),
        ("num_bytes", pa.int64()),
        ("prompt", pa.string()),
        ("reference", pa.string()),
        ("answer", pa.string()),
        ("ended", pa.bool_()),
        ("reference_tokens", pa.int64()),
        ("exact_match", pa.bool_()),
        ("rouge_l", pa.float64()),
        ("tool_names", pa.float64()),
        ("tool_arguments", pa.float64()),
        ("tool_calls", pa.float64()),
        ("score", pa.float64()),
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One held-out conversation.

    `loss_sum` is in nats over `tokens` supervised tokens; `num_bytes` is the size of the trained answers as UTF-8,
    whatever tokenizer or template reads them. `encoding` is a digest of the ids and labels that were scored: token
    losses of two models may be compared where it is equal. `ended` says whether the generated answer came to a stop
    token within `evaluate.max_new_tokens`; `reference_tokens` is how many the reference takes, its stop token
    included. These two, `exact_match` (0 or 1), `rouge_l` (0 to 1) and `score` (the user's) are None where no answer
    was generated, `score` also where there is no scorer, and the first two in reports of earlier versions. Where the
    reference calls tools, `tool_names`, `tool_arguments` and `tool_calls` (see `calls`) stand for these three.
    """

    row_id: str
    dataset: str
    tags: list[str] = field(default_factory=list)
    encoding: str = ""
    tokens: int
    correct_tokens: int
    loss_sum: float
    num_bytes: int
    prompt: str
    reference: str
    answer: str | None = None
    ended: bool | None = None
    reference_tokens: int | None = None
    exact_match: bool | None = None
    rouge_l: float | None = None
    tool_names: float | None = None
    tool_arguments: float | None = None
    tool_calls: float | None = None
    score: float | None = None


@dataclass(frozen=True, slots=True)
class Identity:
    """What a model reads by: hashes of its tokenizer and of its chat template."""

    tokenizer: str = ""
    chat_template: str = ""


@dataclass(frozen=True, slots=True)
class Metric:
    """How a metric comes from scores: sum of `value` over sum of `weight`, of the rows whose value is not None."""

    value: Callable[[Score], float | None]
    weight: Callable[[Score], float]
    lower_is_better: bool = False
    unit: str = ""

    def of(self, scores: Iterable[Score]) -> float | None:
        """The metric; None where no row has a value, or nothing to weigh by."""
        pairs = [(value, self.weight(score)) for score in scores if (value := self.value(score)) is not None]
        weight = math.fsum(w for _, w in pairs)
        return math.fsum(value for value, _ in pairs) / weight if weight else None


METRICS: dict[str, Metric] = {
    "loss": Metric(lambda s: s.loss_sum, lambda s: s.tokens, lower_is_better=True, unit="nats a token"),
    "bits_per_byte": Metric(
        lambda s: s.loss_sum / math.log(2), lambda s: s.num_bytes, lower_is_better=True, unit="bits a byte"
    ),
    "token_accuracy": Metric(lambda s: s.correct_tokens, lambda s: s.tokens, unit="of the supervised tokens"),
    "ended": Metric(lambda s: s.ended, lambda _: 1.0, unit="of the answers"),
    "exact_match": Metric(lambda s: s.exact_match, lambda _: 1.0, unit="of the answers"),
    "rouge_l": Metric(lambda s: s.rouge_l, lambda _: 1.0, unit="ROUGE-L F1"),
    "tool_names": Metric(lambda s: s.tool_names, lambda _: 1.0, unit="of the tool calls"),
    "tool_arguments": Metric(lambda s: s.tool_arguments, lambda _: 1.0, unit="of the tool calls"),
    "tool_calls": Metric(lambda s: s.tool_calls, lambda _: 1.0, unit="of the tool calls"),
    "score": Metric(lambda s: s.score, lambda _: 1.0, unit="the scorer's mean"),
}


@dataclass(frozen=True, slots=True)
class EvaluationReport:
    """Scores of one model on one held-out set. `harness`: figures of lm-evaluation-harness, `task/metric` each."""

    scores: tuple[Score, ...]
    identity: Identity = Identity()
    harness: dict[str, float] = field(default_factory=dict)

    def metrics(self) -> dict[str, float]:
        """Over all rows: METRICS as far as there are values, and perplexity."""
        values = {name: metric.of(self.scores) for name, metric in METRICS.items()}
        metrics = {name: value for name, value in values.items() if value is not None}
        if "loss" in metrics:
            metrics["perplexity"] = math.exp(min(metrics["loss"], 700.0))
        return metrics


def write_report(report: EvaluationReport, out: Path) -> dict[str, Any]:
    """Write both files; return what `report.json` holds."""
    out.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist([asdict(score) for score in report.scores], schema=SCHEMA), out / SCORES)
    answered = [score for score in report.scores if score.answer is not None]
    summary = {
        "metrics": report.metrics() | {f"harness/{key}": value for key, value in report.harness.items()},
        "rows": len(report.scores),
        "tokens": sum(score.tokens for score in report.scores),
        "generated_rows": len(answered),
        "ended_rows": sum(bool(score.ended) for score in answered),
        "identity": asdict(report.identity),
        "samples": [
            {"row_id": s.row_id, "prompt": s.prompt, "reference": s.reference, "answer": s.answer}
            for s in answered[:SAMPLES]
        ],
    }
    (out / REPORT).write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n", "utf-8")
    return summary


def answers_ended(facts: Mapping[str, Any]) -> str:
    """`70 of 72`, from the facts of evaluate; empty where none was generated, or it was not counted yet."""
    answers = facts.get("generated_rows", 0)
    return f"{facts['ended_rows']} of {answers}" if answers and "ended_rows" in facts else ""


def read_report(folder: Path) -> EvaluationReport:
    """Back from `write_report`."""
    summary = json.loads((folder / REPORT).read_text("utf-8"))
    harness = {
        key.removeprefix("harness/"): value for key, value in summary["metrics"].items() if key.startswith("harness/")
    }
    scores = tuple(Score(**row) for row in pq.read_table(folder / SCORES).to_pylist())
    return EvaluationReport(scores, Identity(**summary["identity"]), harness)
