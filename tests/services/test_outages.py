"""A server that is killed in mid-run and started again: training goes on, no metric is missing, no run hangs."""

import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from mlflow.tracking import MlflowClient

from cli.servers import START_SECONDS, start_mlflow, wait_for
from sft_core.train.metrics import read_metrics
from tests.services.prepared import begin_with
from tests.services.stack import RECIPE, RUN_SECONDS, Stack, wait_until, write_project

AWAY_SECONDS = 20.0
"""How long a server is away, besides its start; MLflow's client here is set to give up sooner."""
STEPS = 30
IMPATIENT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
SLOW = RECIPE.replace("max_steps: 3", f"max_steps: {STEPS}").replace(
    "gradient_accumulation_steps: 1", "gradient_accumulation_steps: 24"
)
"""Training that lasts longer than it takes to see it begin."""


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, prepared: Path) -> Iterator[Stack]:
    """As docs/operations.md says: leases of limited deployments in files. By default they are in memory: after a
    restart of the server, each run of a limited deployment is told that its slot is gone, and crashes."""
    stack = Stack(
        write_project(tmp_path_factory.mktemp("outages"), tiny_model),
        PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE="prefect.server.concurrency.lease_storage.filesystem",
        MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false",
        **IMPATIENT,
    )
    try:
        yield begin_with(stack, prepared).start()
    finally:
        stack.stop()


def test_servers_that_are_killed_in_mid_training_are_waited_for(stack: Stack) -> None:
    """MLflow's until training is over, Prefect's while it goes on; training waits for neither."""
    run_id = retrain(stack, "back", {}, compute="compute: {train: train/gpu}")
    lines_of(stack, "back", at_least=2)
    stack.processes["mlflow"].kill()
    seen = len(metrics(stack, "back"))
    lines_of(stack, "back", at_least=seen + 5)  # MLflow's does not answer, training goes on
    stack.processes["prefect"].kill()
    seen = len(metrics(stack, "back"))
    lines_of(stack, "back", at_least=seen + 5)  # nobody answers
    time.sleep(AWAY_SECONDS)
    stack.start_prefect()
    checkpoint(stack, "back")
    time.sleep(AWAY_SECONDS)
    assert stack.flow_run(run_id)["state_type"] == "RUNNING"
    restart_mlflow(stack)
    finished = stack.wait_final(run_id)
    assert finished["state_name"] == "Completed", stack.logs(run_id)[-5:]
    assert_nothing_is_missing(stack, "back")
    parts = sorted(run["name"] for run in stack.children(run_id))
    assert parts == ["prepare back", "publish back", "train back"]
    final = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
    assert {run["state_type"] for run in runs(stack, "flow_runs")} <= final
    wait_until(lambda: {run["state_type"] for run in runs(stack, "task_runs")} <= final, START_SECONDS)


def test_mlflow_that_stays_away_fails_the_run_after_training_and_the_next_reuses_it(stack: Stack) -> None:
    run_id = retrain(stack, "gone", {"SFT_MLFLOW_PATIENCE_SECONDS": "8"})
    lines_of(stack, "gone", at_least=2)
    stack.processes["mlflow"].kill()
    failed = stack.wait_final(run_id)
    assert failed["state_type"] == "FAILED"
    assert "has not answered for 8 s" in failed["state"]["message"]
    assert len(metrics(stack, "gone")) == STEPS
    trained = checkpoint(stack, "gone").read_bytes()
    again_id = retrain(stack, "gone", {})  # MLflow is away when its first part begins
    wait_until(lambda: stack.flow_run(again_id)["state_type"] == "RUNNING", RUN_SECONDS)
    time.sleep(AWAY_SECONDS)
    restart_mlflow(stack)
    again = stack.wait_final(again_id)
    assert again["state_name"] == "Completed", stack.logs(again_id)[-5:]
    assert checkpoint(stack, "gone").read_bytes() == trained
    assert_nothing_is_missing(stack, "gone")


def retrain(stack: Stack, name: str, environment: dict[str, str], compute: str = "") -> str:
    """Start `retrain/on-demand` of a recipe of that name with a store of its own; the flow run's id."""
    recipe = SLOW.replace("name: orders", f"name: {name}").replace("./store", f"./store-{name}")
    (stack.folder / f"{name}.yaml").write_text(recipe + compute)
    deployment = stack.api("GET", "/deployments/name/retrain/on-demand")
    body = {
        "parameters": {"recipe": f"{name}.yaml"},
        "job_variables": {"env": environment},
        "idempotency_key": uuid.uuid4().hex,
    }

    def create() -> str | None:
        try:
            return str(stack.api("POST", f"/deployments/{deployment['id']}/create_flow_run", body)["id"])
        except httpx.HTTPStatusError as error:  # SQLite, "database is locked": Prefect's own client asks again too
            if error.response.status_code != httpx.codes.SERVICE_UNAVAILABLE:
                raise
            return None

    return wait_until(create, START_SECONDS)


def restart_mlflow(stack: Stack) -> None:
    """On its port, with its database."""
    stack.processes["mlflow"] = start_mlflow(stack.folder, stack.mlflow_port, stack.environment)
    wait_for(stack.processes["mlflow"], f"{stack.mlflow_url}/health")


def metrics(stack: Stack, name: str) -> list[dict[str, Any]]:
    """What training has written so far, or in all."""
    folder = stack.folder / f"store-{name}" / "train"
    files = [*folder.glob("*/metrics.jsonl"), *folder.glob("*/checkpoints/*/metrics.jsonl")]
    return read_metrics(files[0]) if files else []


def lines_of(stack: Stack, name: str, at_least: int) -> None:
    """Wait until training has written so many lines; it must not be at its end then."""
    wait_until(lambda: len(metrics(stack, name)) >= at_least, RUN_SECONDS, every=0.1)
    assert len(metrics(stack, name)) < STEPS, "training is too quick for this test"


def checkpoint(stack: Stack, name: str) -> Path:
    """The finished checkpoint's manifest, waited for."""
    folder = stack.folder / f"store-{name}" / "train"
    return wait_until(lambda: next(folder.glob("*/manifest.json"), None), RUN_SECONDS)


def assert_nothing_is_missing(stack: Stack, name: str) -> None:
    """MLflow has training's metrics line by line, one ended run a part, one version."""
    client = MlflowClient(stack.mlflow_url)
    experiment = client.get_experiment_by_name(name)
    found = {run.data.tags["sft.part"]: run for run in client.search_runs([experiment.experiment_id])}
    assert {part: run.info.status for part, run in found.items()} == dict.fromkeys(
        ["retraining", "prepare", "train", "publish"], "FINISHED"
    )
    assert len(client.search_runs([experiment.experiment_id])) == 4
    lines = metrics(stack, name)
    assert [line["optimizer_step"] for line in lines] == list(range(1, STEPS + 1))
    for key in ("loss", "learning_rate", "tokens"):
        sent = client.get_metric_history(found["train"].info.run_id, f"train/{key}")
        expected = [(line["optimizer_step"], line["time"], line[key]) for line in lines]
        assert sorted((point.step, point.timestamp, point.value) for point in sent) == expected
    assert len(client.search_model_versions(f"name='{name}'")) == 1


def runs(stack: Stack, kind: str) -> list[dict[str, Any]]:
    """All `flow_runs` or `task_runs` of the server."""
    return list(stack.api("POST", f"/{kind}/filter", {"limit": 200}))
