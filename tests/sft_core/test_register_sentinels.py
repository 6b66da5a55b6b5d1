"""What must not be registered is named; what is well is passed over."""

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sft_core.errors import DataError
from sft_core.evaluate import EvaluationReport, Score
from sft_core.register import (
    Finding,
    broken_adapter,
    certificate_over_bound,
    evaluation_rows_in_training,
    no_supervised_tokens,
    read_row_ids,
    refuse,
    strange_scores,
)

SCORE = Score(row_id="a", dataset="d", tokens=2, correct_tokens=1, loss_sum=3.0, num_bytes=4, prompt="", reference="")


def names(findings: list[Finding]) -> list[str]:
    return [finding.name for finding in findings]


def ledger(out: int) -> dict[str, object]:
    return {"supervised_tokens": {"in": 10, "out": out, "set_aside": {"overlong": 10 - out}}}


def certificate(kl: float, *, certified: bool = True) -> dict[str, object]:
    candidates = {"full": {"kl": kl}, "dequantized": {"kl": 0.9}}
    return {"certificate": {"certified": certified, "chosen": "full", "candidates": candidates}}


def test_zero_supervised_tokens() -> None:
    assert names(no_supervised_tokens(ledger(0))) == ["no_supervised_tokens"]
    assert no_supervised_tokens(ledger(1)) == []


@pytest.mark.parametrize(
    ("norm", "swallowed", "expected"),
    [
        (1.0, 0, []),
        (1.0, 13, []),
        (0.0, 0, ["inert_adapter"]),
        (float("nan"), 0, ["adapter_not_finite"]),
        (1.0, 14, ["merged_equals_base"]),
    ],
)
def test_an_adapter_that_is_broken_or_changes_nothing(norm: float, swallowed: int, expected: list[str]) -> None:
    assert names(broken_adapter({"norm_b": norm}, {"merged": 14, "swallowed_by_rounding": swallowed})) == expected


def test_a_full_fine_tuning_has_no_adapter_to_find_fault_with() -> None:
    assert broken_adapter({}, {}) == []


@pytest.mark.parametrize(("kl", "expected"), [(0.05, 0), (0.051, 1), (float("nan"), 1), (-1e-9, 0)])
def test_a_certificate_over_its_bound(kl: float, expected: int) -> None:
    assert len(certificate_over_bound(certificate(kl), 0.05)) == expected
    assert certificate_over_bound(certificate(kl, certified=False), 0.05) == []


def test_evaluation_rows_in_training(tmp_path: Path) -> None:
    for side, ids in {"train": ["a", "b"], "heldout": ["b", "c"]}.items():
        (tmp_path / side).mkdir()
        pq.write_table(pa.table({"row_id": ids}), tmp_path / side / "part-00000.parquet")
    train, held_out = (list(read_row_ids(tmp_path, side)) for side in ("train", "heldout"))
    (finding,) = evaluation_rows_in_training(train, held_out)
    assert finding.words == "1 held-out rows were trained on (row_id b)"
    assert evaluation_rows_in_training(["a"], held_out) == []


def test_scores_that_are_not_finite_or_the_bases_own() -> None:
    well, bad = EvaluationReport((SCORE,)), EvaluationReport((replace(SCORE, loss_sum=float("nan")),))
    other = EvaluationReport((replace(SCORE, loss_sum=3.1),))
    assert names(strange_scores(well, other)) == []
    assert names(strange_scores(bad, other)) == ["loss_not_finite"]
    assert names(strange_scores(well, well)) == ["scores_equal_base"]


def test_findings_refuse_with_all_their_words() -> None:
    refuse([])
    with pytest.raises(DataError, match=r"^not registered: one; two\. The champion stays$"):
        refuse([Finding("a", "one"), Finding("b", "two")])
