"""A holder's folder is its own: what it left goes on to the next one, and whoever lost it reaches nothing of that."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from sft_core import steps
from sft_core.artifacts import Outcome
from sft_core.errors import StoreError
from sft_core.lease import Holder
from sft_core.plan import plan_recipe
from sft_core.recipe import resolve
from sft_core.steps import Retraining, run_step
from sft_core.store import Store
from sft_core.train.holders import holders, newest_holder, take_over

FIRST, SECOND, THIRD = "00000001-aaaaaaaa", "00000002-bbbbbbbb", "00000003-cccccccc"


def test_state_goes_on_to_the_next_holder_and_the_last_one_has_no_path_to_it(tmp_path: Path) -> None:
    first = take_over(tmp_path, FIRST)
    (first / "checkpoint-3").mkdir()
    log = (first / "train.log").open("ab", buffering=0)
    log.write(b"one\n")
    second = take_over(tmp_path, SECOND)
    log.write(b"of the loser\n")  # its file is open
    log.close()
    assert (second / "checkpoint-3").is_dir()
    assert (second / "train.log").read_bytes() == b"one\n"
    assert not first.exists()
    (first / "checkpoint-4").mkdir(parents=True)  # what the loser's ranks save
    assert [path.name for path in second.glob("checkpoint-*")] == ["checkpoint-3"]
    third = take_over(tmp_path, THIRD)
    assert [path.name for path in third.glob("checkpoint-*")] == ["checkpoint-3"]
    assert holders(tmp_path) == [third]
    assert newest_holder(tmp_path) == third


def test_a_holder_that_comes_late_takes_nothing_from_the_next_one(tmp_path: Path) -> None:
    """It was suspended between getting the lease and taking over."""
    second = take_over(tmp_path, SECOND)
    (second / "checkpoint-3").mkdir()
    first = take_over(tmp_path, FIRST)
    assert list(first.iterdir()) == []
    assert (second / "checkpoint-3").is_dir()
    assert newest_holder(tmp_path) == second


@pytest.fixture
def retraining(tiny_model: Path, tmp_path: Path) -> Retraining:
    """One that is planned; only its train step is run."""
    (tmp_path / "rows.jsonl").write_text('{"input": "ask", "output": "say"}\n')
    values = {"name": "r", "base_model": {"path": str(tiny_model)}, "pack": {"chat_template": "chatml"}}
    recipe = resolve({**values, "datasets": [{"path": str(tmp_path / "rows.jsonl")}]})
    return Retraining(recipe, plan_recipe(recipe), Store(str(tmp_path / "store")), lambda _: None)


def test_a_trainer_that_loses_its_lease_behind_its_last_step_neither_publishes_nor_deletes(
    retraining: Retraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, fingerprint = retraining.store, retraining.plan["train"].fingerprint
    work = store.work_in_progress("train", fingerprint)

    def train(run: Retraining, planned: Any, out: Path) -> Outcome:
        (out / "result").write_text("x")
        taken = {"machine": "another", "born": "1", "token": "t", "host": "far", "pid": 1}
        holder = {**json.loads(Holder(seconds=60.0, renewed=datetime.now(UTC).isoformat()).as_bytes()), **taken}
        store.files.write(f"{work}/lease/00000002.json", json.dumps(holder).encode())
        (take_over(work, SECOND) / "checkpoint-1").mkdir()
        return Outcome()

    monkeypatch.setitem(steps.BUILDERS, "train", train)
    with pytest.raises(StoreError, match="another one took over"):
        run_step(retraining, "train")
    assert store.find("train", fingerprint) is None
    assert (work / SECOND / "checkpoint-1").is_dir()
    assert json.loads((work / "lease" / "00000002.json").read_text())["host"] == "far"


def test_a_training_that_is_done_leaves_its_artifact_alone(
    retraining: Retraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, fingerprint = retraining.store, retraining.plan["train"].fingerprint

    def train(run: Retraining, planned: Any, out: Path) -> Outcome:
        assert run.lease is not None
        (take_over(store.work_in_progress("train", fingerprint), run.lease.name) / "checkpoint-1").mkdir()
        (out / "result").write_text("x")
        return Outcome()

    monkeypatch.setitem(steps.BUILDERS, "train", train)
    assert not run_step(retraining, "train").reused
    assert sorted(path.name for path in (Path(store.url) / "train" / fingerprint).iterdir()) == [
        "manifest.json",
        "result",
    ]
    assert run_step(retraining, "train").reused
    assert sorted(path.name for path in (Path(store.url) / "train" / fingerprint).iterdir()) == [
        "manifest.json",
        "result",
    ]
