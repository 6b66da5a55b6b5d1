"""Slices: a good model passes twenty of them, a model that hurts one does not."""

from dataclasses import replace

import numpy as np

from sft_core.evaluate import EvaluationReport, Score
from sft_core.register import Terms, judge
from sft_core.register.comparison import pair
from sft_core.register.slices import SliceResult, judge_slices

TERMS = Terms(slice_margin=0.02)


def report(losses: np.ndarray, datasets: list[str]) -> EvaluationReport:
    return EvaluationReport(
        tuple(
            Score(
                row_id=str(i),
                dataset=dataset,
                encoding="same",
                tokens=10,
                correct_tokens=5,
                loss_sum=10 * float(loss),
                num_bytes=30,
                prompt="",
                reference="",
            )
            for i, (loss, dataset) in enumerate(zip(losses, datasets, strict=True))
        )
    )


def judged(losses: np.ndarray, others: np.ndarray, datasets: list[str]) -> dict[str, SliceResult]:
    paired = pair(report(losses, datasets), report(others, datasets), "loss", frozenset())
    return {result.name.removeprefix("data set "): result for result in judge_slices(paired, 0.02)}


def test_noise_in_twenty_slices_seldom_blocks_a_good_model() -> None:
    """5 % at most from large slices that fail to prove it, 5 % from small ones that look worse by chance."""
    blocked = 0
    for seed in range(8):
        rng = np.random.default_rng(seed)
        datasets = [f"d{i % 20}" for i in range(2000)]
        spread = np.array([0.02 if i % 20 < 10 else 0.4 for i in range(2000)])  # ten slices precise, ten noisy
        others = 1.0 + 0.1 * rng.standard_normal(2000)
        results = judged(others - 0.001 + spread * rng.standard_normal(2000), others, datasets)
        assert len(results) == 20
        blocked += any(result.blocks for result in results.values())
    assert blocked <= 3  # P(Binomial(8, 0.1) > 3) = 0.005, and the seeds are fixed


def test_a_slice_that_gets_worse_blocks_a_model_that_is_better_overall() -> None:
    rng = np.random.default_rng(0)
    datasets = ["big"] * 900 + ["hurt"] * 100
    others = 1.0 + 0.02 * rng.standard_normal(1000)
    losses = others - np.where(np.array(datasets) == "hurt", -0.1, 0.1) + 0.02 * rng.standard_normal(1000)
    results = judged(losses, others, datasets)
    assert results["hurt"].outcome == "worse"
    assert results["big"].outcome == "held"
    verdict = judge(report(losses, datasets), report(others, datasets), None, TERMS)
    assert verdict.comparisons[0].tuned_is_better
    assert not verdict.promote
    assert "slice data set hurt (100 rows): worse by more than the margin" in verdict.words


def test_a_slice_large_enough_must_prove_that_it_is_no_worse() -> None:
    """Worse by the margin itself: not shown to be worse than the margin, and not proved to be better than it."""
    rng = np.random.default_rng(1)
    datasets = ["big"] * 500 + ["edge"] * 500
    others = np.ones(1000)
    losses = others - np.where(np.array(datasets) == "edge", -0.02, 0.1) + 0.02 * rng.standard_normal(1000)
    assert judged(losses, others, datasets)["edge"].outcome == "unproved"


def test_a_slice_too_noisy_to_prove_anything_is_open_and_a_tiny_one_is_not_judged() -> None:
    rng = np.random.default_rng(2)
    datasets = ["big"] * 500 + ["noisy"] * 30 + ["tiny"] * 5
    others = np.ones(535)
    spread = np.array([0.01] * 500 + [1.0] * 30 + [0.01] * 5)
    losses = others - 0.001 + spread * rng.standard_normal(535)
    losses[-5:] = 2.0
    results = judged(losses, others, datasets)
    assert [results[name].outcome for name in ("big", "noisy", "tiny")] == ["held", "open", "small"]
    assert not any(result.blocks for result in results.values())


def test_slices_are_data_sets_lengths_and_tags() -> None:
    whole = report(np.ones(60), ["a"] * 30 + ["b"] * 30)
    scores = tuple(
        replace(score, num_bytes=10 + i, tags=["tools"] if i < 25 else []) for i, score in enumerate(whole.scores)
    )
    paired = pair(EvaluationReport(scores), whole, "loss", frozenset())
    assert {result.name: result.rows for result in judge_slices(paired, 0.02)} == {
        "data set a": 30,
        "data set b": 30,
        "answers up to 29 bytes": 20,
        "answers of 30 to 49 bytes": 20,
        "answers over 49 bytes": 20,
        "tag tools": 25,
    }
    assert judge_slices(pair(whole, whole, "loss", frozenset()).only(np.arange(60) < 30), 0.02) == ()
