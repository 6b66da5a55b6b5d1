"""The verdict: surely better than base and champion on the same rows, no worse on any slice, or the champion stays."""

from dataclasses import replace

import numpy as np
import pytest

from sft_core.errors import DataError
from sft_core.evaluate import EvaluationReport, Score
from sft_core.register import Terms, Verdict, judge
from sft_core.register.comparison import pair
from sft_core.register.statistics import gain_found, p_value

EXACT = Terms(primary_metric="exact_match")


def report(
    losses: list[float], match: list[bool] | None = None, prefix: str = "r", dataset: str = "d"
) -> EvaluationReport:
    return EvaluationReport(
        tuple(
            Score(
                row_id=f"{prefix}{i}",
                dataset=dataset,
                encoding="same",
                tokens=10,
                correct_tokens=5,
                loss_sum=loss * 10,
                num_bytes=20 + i,
                prompt="p",
                reference="a",
                answer=None if match is None else "a",
                exact_match=None if match is None else match[i],
            )
            for i, loss in enumerate(losses)
        )
    )


def noisy(mean: float, rows: int, spread: float = 0.05, seed: int = 0) -> EvaluationReport:
    return report((mean + spread * np.random.default_rng(seed).standard_normal(rows)).tolist())


def test_better_than_base_without_a_champion_is_promoted() -> None:
    verdict = judge(report([1.0] * 12), report([2.0] * 12), None, Terms())
    assert verdict.promote
    assert verdict.words.startswith("promoted: beats the base: loss 1.0000 against 2.0000 on 12 rows (p = 0.00024,")


@pytest.mark.parametrize("tuned", [1.0, 1.5])
def test_a_tie_or_a_loss_keeps_the_champion(tuned: float) -> None:
    verdict = judge(report([tuned] * 50), report([2.0] * 50), report([1.0] * 50), Terms())
    assert not verdict.promote
    assert "does not beat the champion" in verdict.words


def test_worse_than_its_base_is_never_promoted() -> None:
    assert not judge(report([3.0] * 50), report([2.0] * 50), report([4.0] * 50), Terms()).promote


def test_a_gain_within_the_noise_keeps_the_champion_and_one_outside_it_does_not() -> None:
    base = report([3.0] * 200)
    assert not judge(noisy(1.0 - 0.002, 200, seed=1), base, noisy(1.0, 200, seed=2), Terms()).promote
    assert judge(noisy(1.0 - 0.05, 200, seed=1), base, noisy(1.0, 200, seed=2), Terms()).promote


def test_the_margin_is_a_fraction_of_the_others_loss() -> None:
    def promotes(margin: float) -> bool:
        return judge(noisy(0.9, 200, seed=1), noisy(1.0, 200, seed=2), None, Terms(margin=margin)).promote

    assert promotes(0.05)
    assert not promotes(0.15)


def test_each_challenge_of_a_champion_asks_for_more() -> None:
    def judged(challenge: int) -> Verdict:
        base, champion = report([3.0] * 200), noisy(1.0, 200, seed=2)
        return judge(noisy(0.99, 200, seed=1), base, champion, Terms(challenge=challenge))

    p = judged(1).comparisons[1].p
    assert judged(1).comparisons[1].level > p > judged(100).comparisons[1].level
    assert judged(1).promote
    assert not judged(100).promote
    assert "challenge 100 of this champion" in judged(100).words


def test_few_rows_say_that_they_can_never_pass_and_how_many_are_needed() -> None:
    verdict = judge(report([1.0] * 6), report([2.0] * 6), None, Terms())
    assert not verdict.promote
    assert "6 held-out rows can never pass: at 0.015 at least 7 are needed" in verdict.words
    assert judge(report([1.0] * 7), report([2.0] * 7), None, Terms()).promote


def test_a_model_that_fails_to_win_is_told_what_would_have_been_found() -> None:
    verdict = judge(noisy(1.0, 100, seed=1), noisy(1.0, 100, seed=2), None, Terms())
    detectable = verdict.comparisons[0].detectable
    assert f"find a gain in loss of {detectable:.3g} four times in five" in verdict.words
    found = 0
    for measured in range(4):  # what can be found was itself measured on 100 rows
        seeds = (1000 + measured, 2000 + measured)
        gain = pair(noisy(1.0, 100, seed=seeds[0]), noisy(1.0, 100, seed=seeds[1]), "loss", frozenset())
        detectable = gain_found(gain.gain, gain.weight, Terms().level, 0.8)
        for i in range(50):
            tuned, other = noisy(1.0 - detectable, 100, seed=2 * i), noisy(1.0, 100, seed=2 * i + 1)
            found += p_value(pair(tuned, other, "loss", frozenset()).gain) <= Terms().level
    assert 130 <= found <= 190  # 160 expected


def test_rows_that_a_model_was_trained_on_are_left_out_and_counted() -> None:
    verdict = judge(report([1.0] * 20), report([2.0] * 20), None, Terms(), iter(["r0", "r1", "elsewhere"]))
    assert (verdict.comparisons[0].rows, verdict.comparisons[0].excluded) == (18, 2)
    assert "2 held-out rows left out" in verdict.words
    with pytest.raises(DataError, match=r"all 2 held-out rows were training rows .*eval_datasets"):
        judge(report([1.0] * 2), report([2.0] * 2), None, Terms(), ["r0", "r1"])


def test_only_rows_that_both_reports_have_are_compared() -> None:
    verdict = judge(report([1.0] * 10 + [9.0]), report([2.0] * 10), None, Terms())
    assert verdict.comparisons[0].rows == 10
    assert verdict.comparisons[0].tuned == 1.0


def test_reports_without_a_common_row_or_metric_are_an_error() -> None:
    with pytest.raises(DataError, match="share no held-out row"):
        judge(report([1.0]), report([1.0], prefix="other"), None, Terms())
    with pytest.raises(DataError, match="set evaluate.max_generated_rows above 0"):
        judge(report([1.0]), report([2.0]), None, EXACT)


def test_exact_match_is_judged_by_the_rows_that_changed() -> None:
    tuned = report([1.0] * 40, [True] * 30 + [False] * 10)
    base = report([1.0] * 40, [True] * 20 + [False] * 20)
    comparison = judge(tuned, base, None, EXACT).comparisons[0]
    assert comparison.p == pytest.approx(2**-10)  # ten changed, all for the better
    assert (comparison.tuned, comparison.other) == (0.75, 0.5)


def test_an_interval_ends_where_the_metric_does() -> None:
    tuned, base = report([0.01] * 20, [True] * 19 + [False]), report([1.0 + i / 10 for i in range(20)], [False] * 20)
    match = judge(tuned, base, None, EXACT).comparisons[0]
    loss = judge(tuned, base, None, Terms()).comparisons[0]
    assert 0.6 < match.low < match.gain == 0.95 < match.high == 1.0
    assert loss.low < loss.gain < loss.high <= loss.other


def test_models_that_read_differently_are_compared_in_bits_a_byte() -> None:
    tuned, base = report([1.0] * 20), report([2.0] * 20)
    other = EvaluationReport(tuple(replace(s, encoding="other", tokens=s.tokens * 3) for s in base.scores))
    verdict = judge(tuned, other, None, Terms())
    assert verdict.comparisons[0].metric == "bits_per_byte"
    assert verdict.comparisons[0].other == pytest.approx(2 * verdict.comparisons[0].tuned)
    assert "bits_per_byte stands in for loss" in verdict.words
    assert judge(tuned, base, None, Terms()).comparisons[0].metric == "loss"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_keeps_the_champion(bad: float) -> None:
    for tuned, base in (([1.0] * 30 + [bad], [2.0] * 31), ([1.0] * 31, [2.0] * 30 + [bad])):
        verdict = judge(report(tuned), report(base), None, Terms())
        assert not verdict.promote
        assert "not finite" in verdict.words


def test_metrics_are_weighted_by_tokens() -> None:
    short = Score(
        row_id="a", dataset="d", tokens=1, correct_tokens=1, loss_sum=4.0, num_bytes=8, prompt="", reference=""
    )
    long = replace(short, row_id="b", tokens=3, loss_sum=0.0)
    metrics = EvaluationReport((short, long)).metrics()
    assert (metrics["loss"], metrics["token_accuracy"]) == (1.0, 0.5)
    assert metrics["bits_per_byte"] == pytest.approx(4.0 / 0.6931471805599453 / 16)
