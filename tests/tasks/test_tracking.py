"""MLflow runs on a real SQLite store: found again by fingerprint, never left RUNNING, recorded once."""

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow.tracking import MlflowClient

from sft_core.artifacts import Artifact, Manifest
from sft_core.plan import Plan, PlannedStep
from sft_core.recipe import Recipe, resolve
from sft_core.steps import Built
from tasks import tracking

ARRIVAL_SECONDS = 240
RECIPE: dict[str, Any] = {"name": "t", "base_model": {"path": "b"}, "datasets": [{"path": "d"}]}


@pytest.fixture
def client(tmp_path: Path, empty_database: Path) -> Iterator[MlflowClient]:
    mlflow.set_tracking_uri(f"sqlite:///{shutil.copyfile(empty_database, tmp_path / 'mlflow.db')}")
    tracking.client.cache_clear()
    yield tracking.client()
    mlflow.set_tracking_uri(None)
    tracking.client.cache_clear()


def recipe() -> Recipe:
    return resolve(RECIPE)


def plan(seed: str = "a") -> Plan:
    keys = ("pack", "merge", "evaluate/tuned", "evaluate/base")
    return Plan({key: PlannedStep(key, seed * 64, {"seed": 1}, {}) for key in keys}, "template", None)


def built() -> Built:
    manifest = Manifest(
        kind="PackedDataset",
        step="pack",
        name="t:pack",
        fingerprint="a" * 64,
        parts={"seed": 1},
        inputs={"conversations": "c" * 64},
        files={},
        ledger={"tokens": {"in": 3, "out": 2, "set_aside": {"overlong": 1}}},
        facts={"fill": 0.5, "pad_token": "x"},
        versions={},
        device="cpu",
        started="2026-01-01T00:00:00+00:00",
        took_seconds=1.5,
    )
    return Built(Artifact(kind="PackedDataset", uri="store/pack/a", fingerprint="a" * 64), manifest, reused=False)


@pytest.mark.parametrize(
    ("fault", "status"), [(None, "FINISHED"), (ValueError, "FAILED"), (KeyboardInterrupt, "KILLED")]
)
def test_a_part_never_stays_running(client: MlflowClient, fault: type[BaseException] | None, status: str) -> None:
    ids = []

    def work() -> None:
        with tracking.part_run("prepare", recipe(), plan()) as run:
            ids.extend([run.run_id, run.parent_run_id])
            assert client.get_run(run.run_id).info.status == "RUNNING"
            if fault is not None:
                raise fault

    if fault is None:
        work()
    else:
        with pytest.raises(fault):
            work()
    assert [client.get_run(run_id).info.status for run_id in ids] == [status, status]


def test_the_same_retraining_finds_its_runs_again_and_another_does_not(client: MlflowClient) -> None:
    with tracking.part_run("prepare", recipe(), plan()) as first:
        pass
    with tracking.part_run("prepare", recipe(), plan()) as again:
        pass
    with tracking.part_run("prepare", recipe(), plan("b")) as other:
        pass
    assert again == first
    assert {other.run_id, other.parent_run_id} & {first.run_id, first.parent_run_id} == set()


class AnswerLost:
    """A client whose server made a run, but died before it answered: the request was sent again."""

    def __init__(self, client: MlflowClient) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def create_run(self, *arguments: Any, **options: Any) -> Any:
        self._client.create_run(*arguments, **options)
        time.sleep(0.01)
        return self._client.create_run(*arguments, **options)


def test_a_run_whose_making_was_not_answered_is_not_doubled(
    client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "client", lambda: AnswerLost(client))
    with tracking.part_run("prepare", recipe(), plan()) as run:
        pass
    found = client.search_runs([client.get_experiment_by_name("t").experiment_id])
    assert {entry.info.run_id for entry in found} == {run.run_id, run.parent_run_id}
    assert len(found) == 2


def test_a_step_recorded_twice_adds_nothing(client: MlflowClient) -> None:
    with tracking.part_run("prepare", recipe(), plan()) as run:
        run.record("pack", built())
        run.record("pack", built())
    assert [m.value for m in client.get_metric_history(run.run_id, "pack/fill")] == [0.5]
    data = client.get_run(run.run_id).data
    assert data.metrics["pack/tokens_in"] == 3.0
    assert data.metrics["pack/took_seconds"] == 1.5
    assert "pack/pad_token" not in data.metrics
    assert data.tags["sft.pack"] == "a" * 64
    path = mlflow.artifacts.download_artifacts(run_id=run.run_id, artifact_path="manifests/pack.json")
    assert json.loads(Path(path).read_text())["inputs"] == {"conversations": "c" * 64}


def test_the_parent_holds_recipe_plan_and_flat_params(client: MlflowClient) -> None:
    with tracking.part_run("prepare", recipe(), plan()) as run:
        pass
    parent = client.get_run(run.parent_run_id)
    assert parent.data.params["train.lora.r"] == "16"
    assert {file.path for file in client.list_artifacts(run.parent_run_id)} == {"recipe.json", "plan.json"}
    assert client.get_run(run.run_id).data.tags["mlflow.parentRunId"] == run.parent_run_id


def test_training_metrics_are_replayed_without_doubling(client: MlflowClient, tmp_path: Path) -> None:
    names = dict.fromkeys(tracking.TRAINING_METRICS, 1.0)
    lines = [{**names, "optimizer_step": step, "time": 1000 + step, "loss": 1 / step} for step in (1, 2)]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with tracking.part_run("train", recipe(), plan()) as run:
        run.record_training(path)
        run.record_training(path)
    history = client.get_metric_history(run.run_id, "train/loss")
    assert [(m.step, m.value) for m in history] == [(1, 1.0), (2, 0.5)]


def test_metrics_arrive_while_training_runs_and_a_dead_server_does_not_hold_it_up(
    client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "FOLLOW_SECONDS", 0.05)
    path = tmp_path / "metrics.jsonl"
    names = dict.fromkeys(tracking.TRAINING_METRICS, 1.0)
    with tracking.part_run("train", recipe(), plan()) as run:
        with run.following(lambda: path):
            path.write_text(json.dumps({**names, "optimizer_step": 1, "time": 1001}) + "\n")
            deadline = time.monotonic() + ARRIVAL_SECONDS
            while not client.get_metric_history(run.run_id, "train/loss") and time.monotonic() < deadline:
                time.sleep(0.05)
            assert len(client.get_metric_history(run.run_id, "train/loss")) == 1
        missing = tracking.PartRun("no-such-run", run.parent_run_id)
        with missing.following(lambda: path):
            time.sleep(0.3)  # every sending fails; nothing is raised here
