"""What is known before training is said before training: too little held out, too few steps."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sft_core.errors import DataError, RecipeError
from sft_core.evaluate import EvaluationReport, Score
from sft_core.outlook import check_heldout, check_scorable, heldout_needed
from sft_core.outlook.training import few_steps
from sft_core.pack import load_chat_template, pack_dataset
from sft_core.recipe import PackConfig, Recipe, resolve
from sft_core.register import Terms, judge


def recipe(**changes: Any) -> Recipe:
    return resolve({"name": "r", "base_model": {"path": "base"}, "datasets": [{"path": "rows.jsonl"}]}, changes)


def report(loss: float, rows: int) -> EvaluationReport:
    score = {"dataset": "d", "tokens": 10, "correct_tokens": 5, "num_bytes": 20, "prompt": "p", "reference": "a"}
    return EvaluationReport(tuple(Score(row_id=str(i), loss_sum=loss, **score) for i in range(rows)))


@pytest.mark.parametrize(
    ("register", "needed"),
    [({}, 7), ({"alpha": 0.5}, 3), ({"alpha": 0.001}, 12), ({"challenges_a_year": 1}, 5), ({"min_heldout_rows": 2}, 2)],
)
def test_as_many_are_needed_as_the_gate_asks_for(register: dict[str, Any], needed: int) -> None:
    asked = recipe(register=register)
    assert heldout_needed(asked.register_) == needed
    if "min_heldout_rows" not in register:  # the gate itself, on a model that is better on every row
        terms = Terms(alpha=asked.register_.alpha, challenges_a_year=asked.register_.challenges_a_year)
        assert judge(report(1.0, needed), report(2.0, needed), None, terms).promote
        assert not judge(report(1.0, needed - 1), report(2.0, needed - 1), None, terms).promote


def normalized(heldout: int, **set_aside: int) -> tuple[dict[str, Any], dict[str, Any]]:
    return {"heldout_rows": heldout}, {"rows": {"in": 100, "out": 90, "set_aside": set_aside}}


def test_too_few_held_out_rows_end_the_run() -> None:
    check_heldout(recipe(), *normalized(7))
    check_heldout(recipe(register={"min_heldout_rows": 1}), *normalized(1))
    with pytest.raises(DataError) as caught:
        check_heldout(recipe(), *normalized(6, near_duplicate=31, also_in_training=2, empty_answer=4))
    assert str(caught.value) == (
        "6 held-out rows are too few (set aside: 2 are in training too, 31 are near duplicates of training rows "
        "(normalize.near_duplicates)): with fewer than 7 the gate can never promote a model. Raise eval_fraction, name "
        "eval_datasets, or add rows; register.min_heldout_rows: 1 trains all the same"
    )
    with pytest.raises(DataError, match=r"^9 held-out rows are too few: register\.min_heldout_rows is 10\. Raise"):
        check_heldout(recipe(register={"min_heldout_rows": 10}), *normalized(9))


def test_held_out_rows_that_cannot_be_scored_end_the_run(
    tiny_model: Path, write_conversations: Callable[..., Path], tmp_path: Path
) -> None:
    template = load_chat_template("chatml")
    conversations = write_conversations(tmp_path / "c", 1, 8)
    pack_dataset(conversations, tiny_model, PackConfig(chat_template="chatml"), 42, tmp_path / "packed")

    def check(**changes: Any) -> None:
        check_scorable(recipe(**changes), conversations, tmp_path / "packed", template)

    check(pack={"max_length": 128})
    check(evaluate={"primary_metric": "exact_match"})
    with pytest.raises(
        DataError, match=r"only 0 held-out rows can be scored \(set aside: 8 overlong\): with fewer than 7"
    ):
        check(pack={"max_length": 16})
    few = write_conversations(tmp_path / "few", 1, 6)
    with pytest.raises(DataError, match="only 6 held-out rows can be scored by a text answer"):
        check_scorable(recipe(evaluate={"primary_metric": "rouge_l"}), few, tmp_path / "packed", template)


def test_a_metric_of_answers_needs_answers() -> None:
    assert recipe(evaluate={"primary_metric": "exact_match", "max_generated_rows": 7})
    assert recipe(evaluate={"primary_metric": "loss", "max_generated_rows": 0})
    with pytest.raises(RecipeError, match=r"evaluate\.max_generated_rows is 6: with fewer than 7 the gate can never"):
        recipe(evaluate={"primary_metric": "exact_match", "max_generated_rows": 6})


@pytest.mark.parametrize(
    ("train", "packed_rows", "steps"),
    [
        ({}, 154, "about 29 "),  # 154 rows, 3 epochs, 16 rows a step
        ({}, 155, None),  # 30 steps
        ({"num_train_epochs": 1, "num_processes": 2}, 154, "about 5 "),
        ({"gradient_accumulation_steps": 1}, 10, None),
        ({"num_processes": 4, "sequence_parallel_size": 4}, 155, None),
        ({"max_steps": 3}, 10, None),  # as asked
    ],
)
def test_few_optimizer_steps_are_a_warning(train: dict[str, Any], packed_rows: int, steps: str | None) -> None:
    said = few_steps(recipe(train=train), packed_rows)
    assert [words[: len(steps or "")] for words in said] == ([steps] if steps else [])
    for words in said:
        assert "train.gradient_accumulation_steps (16)" in words
        assert "train.num_train_epochs" in words
