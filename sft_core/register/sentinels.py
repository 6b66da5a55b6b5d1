"""What must never be registered, however good its scores: each check is a pure function of facts that steps recorded.

In: ledgers, facts, reports, row ids. Out: `Finding`s in words; none if all is well. A fact that a step did not record
(a full fine-tuning has no adapter) is no finding.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_core.errors import DataError
from sft_core.evaluate.report import EvaluationReport

SHOWN = 3


@dataclass(frozen=True, slots=True)
class Finding:
    """Why a model is not registered."""

    name: str
    words: str


def read_row_ids(conversations: Path, side: str) -> Iterator[str]:
    """The row_ids of one side (`train`, `heldout`) of a Conversations folder, file by file."""
    import pyarrow.parquet as pq

    for path in sorted((conversations / side).glob("*.parquet")):
        yield from pq.read_table(path, columns=["row_id"]).column(0).to_pylist()


def no_supervised_tokens(pack_ledger: Mapping[str, Any]) -> list[Finding]:
    """Pack gave training nothing to learn from."""
    entry = pack_ledger.get("supervised_tokens")
    if entry is None or entry["out"] > 0:
        return []
    return [Finding("no_supervised_tokens", f"none of {entry['in']} supervised tokens was packed: nothing was trained")]


def broken_adapter(convert_facts: Mapping[str, Any], merge_facts: Mapping[str, Any]) -> list[Finding]:
    """An adapter of NaN, one that changes nothing, one that no weight took up."""
    found = []
    norm = convert_facts.get("norm_b")
    if norm is not None and not math.isfinite(norm):
        found.append(Finding("adapter_not_finite", f"the norm of the adapter's lora_B is {norm}"))
    if norm == 0:
        found.append(Finding("inert_adapter", "every lora_B of the adapter is zero: it changes nothing"))
    merged, swallowed = merge_facts.get("merged"), merge_facts.get("swallowed_by_rounding", 0)
    if merged is not None and swallowed >= merged:
        found.append(
            Finding(
                "merged_equals_base",
                f"rounding swallowed the update of {swallowed} of {merged} weights: the merged model is its base",
            )
        )
    return found


def certificate_over_bound(merge_facts: Mapping[str, Any], bound: float) -> list[Finding]:
    """The merged model is too far from the one that was trained (nats a token)."""
    certificate = merge_facts.get("certificate") or {}
    if not certificate.get("certified"):
        return []
    divergence = certificate["candidates"][certificate["chosen"]]["kl"]
    if divergence <= bound:  # a NaN is over every bound
        return []
    return [
        Finding(
            "certificate_over_bound",
            f"the merged model is {divergence:.3g} nats a token away from the one trained, over "
            f"register.max_merge_divergence {bound:g}",
        )
    ]


def evaluation_rows_in_training(trained: Iterable[str], held_out: Iterable[str]) -> list[Finding]:
    """Rows on both sides, by row_id."""
    shared = sorted(frozenset(held_out).intersection(trained))
    if not shared:
        return []
    shown = ", ".join(shared[:SHOWN])
    return [Finding("evaluation_rows_in_training", f"{len(shared)} held-out rows were trained on (row_id {shown})")]


def strange_scores(tuned: EvaluationReport, base: EvaluationReport) -> list[Finding]:
    """Losses of NaN or infinity, or equal to the base's to the last bit on every row."""
    bad = sum(not math.isfinite(score.loss_sum) for score in tuned.scores)
    found = [Finding("loss_not_finite", f"the tuned model's loss is not finite on {bad} rows")] if bad else []
    of_base = {score.row_id: score.loss_sum for score in base.scores}
    if all(of_base.get(score.row_id) == score.loss_sum for score in tuned.scores):
        found.append(Finding("scores_equal_base", "the tuned model's loss equals its base's on every row, bit for bit"))
    return found


def refuse(findings: Iterable[Finding]) -> None:
    """DataError with all findings, if there are any."""
    words = [finding.words for finding in findings]
    if words:
        raise DataError("not registered: " + "; ".join(words) + ". The champion stays")
