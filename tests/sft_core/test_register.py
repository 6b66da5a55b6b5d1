"""The verdict: strictly better than base and champion on the same rows, or the champion stays."""

import pytest

from sft_core.errors import DataError
from sft_core.evaluate.report import EvaluationReport, Score
from sft_core.register import judge


def report(*losses: float, match: bool | None = None, prefix: str = "r") -> EvaluationReport:
    return EvaluationReport(
        tuple(
            Score(
                row_id=f"{prefix}{i}",
                dataset="d",
                tokens=10,
                correct_tokens=5,
                loss_sum=loss * 10,
                num_bytes=20,
                prompt="p",
                reference="a",
                answer=None if match is None else "a",
                exact_match=match,
            )
            for i, loss in enumerate(losses)
        )
    )


def test_better_than_base_without_a_champion_is_promoted() -> None:
    verdict = judge(report(1.0, 1.0), report(2.0, 2.0), None, "loss")
    assert verdict.promote
    assert verdict.words == "promoted: beats the base: loss 1.0000 against 2.0000 on 2 rows"


@pytest.mark.parametrize(("tuned", "champion"), [(1.0, 1.0), (1.5, 1.0)])
def test_a_tie_or_a_loss_keeps_the_champion(tuned: float, champion: float) -> None:
    verdict = judge(report(tuned), report(2.0), report(champion), "loss")
    assert not verdict.promote
    assert "does not beat the champion" in verdict.words


def test_worse_than_its_base_is_never_promoted() -> None:
    assert not judge(report(3.0), report(2.0), report(4.0), "loss").promote


def test_only_rows_that_both_reports_have_are_compared() -> None:
    verdict = judge(report(1.0, 9.0), report(2.0), None, "loss")
    assert verdict.comparisons[0].rows == 1
    assert verdict.comparisons[0].tuned == 1.0


def test_reports_without_a_common_row_or_metric_are_an_error() -> None:
    with pytest.raises(DataError, match="share no held-out row"):
        judge(report(1.0), report(1.0, prefix="other"), None, "loss")
    with pytest.raises(DataError, match="set evaluate.max_generated_rows above 0"):
        judge(report(1.0), report(2.0), None, "exact_match")


def test_higher_is_better_for_exact_match() -> None:
    assert judge(report(1.0, match=True), report(1.0, match=False), None, "exact_match").promote


def test_metrics_are_weighted_by_tokens() -> None:
    short = Score(
        row_id="a", dataset="d", tokens=1, correct_tokens=1, loss_sum=4.0, num_bytes=8, prompt="", reference=""
    )
    long = Score(
        row_id="b", dataset="d", tokens=3, correct_tokens=1, loss_sum=0.0, num_bytes=8, prompt="", reference=""
    )
    metrics = EvaluationReport((short, long)).metrics()
    assert (metrics["loss"], metrics["token_accuracy"]) == (1.0, 0.5)
    assert metrics["bits_per_byte"] == pytest.approx(4.0 / 0.6931471805599453 / 16)
