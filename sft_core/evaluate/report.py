"""What evaluate writes: `scores.parquet` (one row a held-out conversation) and `report.json` (their sums)."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

SCORES = "scores.parquet"
REPORT = "report.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One held-out conversation. `loss_sum` is in nats over `tokens` supervised tokens, `num_bytes` their text's size.

    `exact_match` and `answer` are None where no answer was generated.
    """

    row_id: str
    dataset: str
    tokens: int
    correct_tokens: int
    loss_sum: float
    num_bytes: int
    prompt: str
    reference: str
    answer: str | None = None
    exact_match: bool | None = None


@dataclass(frozen=True, slots=True)
class EvaluationReport:
    """Scores of one model on one held-out set."""

    scores: tuple[Score, ...]

    def metrics(self) -> dict[str, float]:
        """Sums over all rows: loss (nats a token), perplexity, bits a byte, token accuracy, exact match."""
        tokens = sum(score.tokens for score in self.scores)
        loss_sum = math.fsum(score.loss_sum for score in self.scores)
        answered = [score.exact_match for score in self.scores if score.exact_match is not None]
        loss = loss_sum / tokens
        metrics = {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "bits_per_byte": loss_sum / math.log(2) / max(1, sum(score.num_bytes for score in self.scores)),
            "token_accuracy": sum(score.correct_tokens for score in self.scores) / tokens,
        }
        if answered:
            metrics["exact_match"] = sum(answered) / len(answered)
        return metrics


def write_report(report: EvaluationReport, out: Path) -> dict[str, Any]:
    """Write both files; return what `report.json` holds."""
    out.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist([asdict(score) for score in report.scores]), out / SCORES)
    answered = [score for score in report.scores if score.answer is not None]
    samples = [{k: asdict(s)[k] for k in ("row_id", "prompt", "reference", "answer")} for s in answered[:5]]
    summary = {
        "metrics": report.metrics(),
        "rows": len(report.scores),
        "tokens": sum(score.tokens for score in report.scores),
        "generated_rows": len(answered),
        "samples": samples,
    }
    (out / REPORT).write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n", "utf-8")
    return summary


def read_report(folder: Path) -> EvaluationReport:
    """Back from `write_report`."""
    return EvaluationReport(tuple(Score(**row) for row in pq.read_table(folder / SCORES).to_pylist()))
