"""The best weights by held-out loss, and the stop when it gets no better; both outlive a kill."""

import random
import shutil
from pathlib import Path

import pytest

from sft_core.plan_parts import _train_parts
from sft_core.recipe import Recipe, TrainConfig
from sft_core.train.best import best_of, stopped_early
from sft_core.train.checkpoints import COMPLETE, Counts, keep_newest, mark_complete, newest_complete
from sft_core.train.metrics import read_metrics
from tests.sft_core.test_train_heldout import evaluations
from tests.sft_core.test_train_resume import kill_once
from tests.sft_core.train_runs import config, train, train_here, weights_hash

PATIENCE = 3
OVERFITS = config(
    lora=None,
    num_train_epochs=40,
    max_steps=40,
    gradient_accumulation_steps=1,
    lr_scheduler_type="constant",
    learning_rate=0.02,
    warmup_ratio=0.0,
    eval_steps=2,
    load_best_model_at_end=True,
    early_stopping_patience=PATIENCE,
    sample_prompts=("say w1", "say it"),
    sample_max_new_tokens=5,
    save_steps=1,
    save_total_limit=1,
)
"""A learning rate at which the held-out loss soon rises again."""


@pytest.fixture(scope="module")
def stopped(packed: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `work` and `out` of a run that ended early."""
    folder = tmp_path_factory.mktemp("stopped")
    train(packed, tiny_model, folder, OVERFITS)
    assert len((folder / "out" / "samples.jsonl").read_text().splitlines()) == 2 * len(evaluations(folder / "out"))
    return folder


@pytest.mark.slow
def test_training_ends_when_patience_does_and_the_best_weights_are_the_result(
    stopped: Path, packed: Path, tiny_model: Path, tmp_path: Path
) -> None:
    found = evaluations(stopped / "out")
    best = min(found, key=lambda step: found[step])
    last = read_metrics(stopped / "out" / "metrics.jsonl")[-1]["optimizer_step"]
    assert last == best + 2 * PATIENCE < 40
    until_best = OVERFITS.model_copy(
        update={"max_steps": best, "load_best_model_at_end": False, "early_stopping_patience": None}
    )
    expected = train_here(packed, tiny_model, tmp_path, until_best)  # a constant rate: the same steps
    assert weights_hash(stopped / "out") == weights_hash(expected)
    kept = sorted(path.name for path in (stopped / "work").glob("checkpoint-*"))
    assert kept == sorted({f"checkpoint-{best}", f"checkpoint-{last}"})


@pytest.mark.slow
def test_best_patience_evaluations_and_samples_survive_kills(
    stopped: Path, packed: Path, tiny_model: Path, tmp_path: Path
) -> None:
    draw = random.Random(1)
    for _ in range(2):
        kill_once(packed, tiny_model, tmp_path, OVERFITS, draw)
    out = train(packed, tiny_model, tmp_path, OVERFITS)
    assert evaluations(out) == evaluations(stopped / "out")
    assert (out / "samples.jsonl").read_bytes() == (stopped / "out" / "samples.jsonl").read_bytes()
    assert weights_hash(out) == weights_hash(stopped / "out")


@pytest.mark.slow
def test_a_run_that_ended_early_and_was_killed_before_publishing_trains_no_further(
    stopped: Path, packed: Path, tiny_model: Path, tmp_path: Path
) -> None:
    shutil.copytree(stopped / "work", tmp_path / "work")
    before = newest_complete(tmp_path / "work")
    out = train(packed, tiny_model, tmp_path, OVERFITS)
    assert newest_complete(tmp_path / "work") == before
    assert weights_hash(out) == weights_hash(stopped / "out")


def test_the_first_of_equal_losses_is_best() -> None:
    history = [{"step": 2, "eval_loss": 3.0}, {"step": 3, "loss": 1.0}, {"step": 4, "eval_loss": 2.0}]
    history += [{"step": 6, "eval_loss": 2.5}, {"step": 8, "eval_loss": 2.0}]
    best = best_of(history)
    assert best is not None
    assert (best.optimizer_step, best.eval_loss, best.since) == (4, 2.0, 2)
    assert best_of([{"step": 1, "loss": 1.0}]) is None


@pytest.mark.parametrize(("patience", "expected"), [(None, False), (1, True), (2, True), (3, False)])
def test_a_checkpoint_says_whether_patience_was_at_its_end(
    patience: int | None, expected: bool, tmp_path: Path
) -> None:
    text = (
        '{"log_history": [{"step": 2, "eval_loss": 1.0}, {"step": 4, "eval_loss": 1.5}, {"step": 6, "eval_loss": 1}]}'
    )
    (tmp_path / "trainer_state.json").write_text(text)
    assert stopped_early(tmp_path, patience) == expected


def test_the_best_checkpoint_is_kept_beside_the_newest(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        (tmp_path / f"checkpoint-{step}").mkdir()
        mark_complete(tmp_path / f"checkpoint-{step}", 1, Counts())
    keep_newest(tmp_path, 2, also=4)
    assert sorted(path.parent.name for path in tmp_path.glob(f"*/{COMPLETE}")) == [
        "checkpoint-4",
        "checkpoint-6",
        "checkpoint-8",
    ]


def test_evaluations_are_in_the_address_only_where_they_decide_what_comes_out() -> None:
    def parts(**changes: object) -> dict[str, object]:
        section = TrainConfig.model_validate(config(**changes).model_dump())
        recipe = {"name": "n", "base_model": {"path": "m"}, "datasets": [{"path": "d"}], "train": section}
        return _train_parts(Recipe.model_validate(recipe))

    assert parts(eval_steps=5, sample_prompts=("hi",), sample_max_new_tokens=9) == parts()
    for key, value in (("load_best_model_at_end", True), ("early_stopping_patience", 2)):
        assert parts(eval_steps=5, **{key: value}) != parts()
        assert parts(eval_steps=5, **{key: value}) != parts(eval_steps=6, **{key: value})
