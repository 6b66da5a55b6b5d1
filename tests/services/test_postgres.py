"""Prefect and MLflow on PostgreSQL, as a team has them: two retrainings at once among 200 short runs, nothing lost or
doubled; both databases restored from dumps into servers that answer the same; a cron over a missed night."""

import shutil
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from cli.servers import last_lines, start
from tests.services.left_alone import (
    active_cron,
    assert_a_missed_night_is_made_up_for,
    begun_since,
    champion,
    completed,
    switch_schedule,
)
from tests.services.postgres import Postgres, postgres
from tests.services.stack import RECIPE, RUN_SECONDS, Stack, wait_until, write_project

SHORT_RUNS = 200
SHORT_PROCESSES = 5
RECORDED_SECONDS = 120.0
"""Bound on the server's recording of task runs, which it does from events, after the runs have ended."""
PARTS = ("retraining", "prepare", "train", "publish")


@pytest.fixture(scope="module")
def database() -> Iterator[Postgres]:
    """Empty databases for both servers."""
    with postgres("prefect", "mlflow") as server:
        yield server


@pytest.fixture(scope="module")
def stack(database: Postgres, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Stack]:
    """Both servers on PostgreSQL, one worker, all deployments."""
    folder = write_project(tmp_path_factory.mktemp("postgres"), tiny_model)
    stack = Stack(folder, **settings(database.url("prefect", "postgresql+asyncpg")))
    try:
        stack.start(backend=database.url("mlflow"))
        stack.worker("cpu")
        stack.worker("gpu")
        stack.deploy()
        yield stack
    finally:
        stack.stop()


def settings(prefect_database: str) -> dict[str, str]:
    """Of all processes; MLflow's own background jobs, seven processes, are not used here."""
    return {
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": prefect_database,
        "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "5",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }


def test_two_retrainings_and_200_short_runs_at_once_lose_and_double_nothing(stack: Stack, database: Postgres) -> None:
    started = []
    for name, deployment in (("first", "retrain/on-demand"), ("second", "retrain/nightly")):
        recipe = RECIPE.replace("name: orders", f"name: {name}\nseed: {len(name)}")  # not the same training
        (stack.folder / f"{name}.yaml").write_text(recipe)
        started.append(stack.run_deployment(deployment, {"recipe": f"{name}.yaml"}))
    run_short(stack)
    ended = [stack.wait_final(run_id) for run_id in started]
    assert [run["state_name"] for run in ended] == ["Completed", "Completed"], stack.logs(started[0])[-5:]

    states = Counter(database.ask("prefect", "select name, state_type from flow_run"))
    short = {run: count for run, count in states.items() if run.startswith("short-")}
    assert short == {f"short-{number}|COMPLETED": 1 for number in range(SHORT_RUNS)}
    parts = [f"{part} {name}|COMPLETED" for part in ("prepare", "train", "publish") for name in ("first", "second")]
    assert states - Counter(short) == Counter([*parts, "retrain first|COMPLETED", "retrain second|COMPLETED"])
    tasks = "select count(*) from task_run where state_type = 'COMPLETED' and name like 'twice%'"
    wait_until(lambda: database.ask("prefect", tasks) == [str(2 * SHORT_RUNS)], RECORDED_SECONDS)
    for name in ("first", "second"):
        assert_recorded_once(MlflowClient(stack.mlflow_url), name)


def run_short(stack: Stack) -> None:
    """SHORT_RUNS flow runs from processes that no worker started."""
    each = SHORT_RUNS // SHORT_PROCESSES
    for first in range(0, SHORT_RUNS, each):
        arguments = ["tests.services.short_runs", str(first), str(each)]
        stack.processes[f"short-{first}"] = start(f"short-{first}", arguments, stack.folder, stack.environment)
    for first in range(0, SHORT_RUNS, each):
        process = stack.processes[f"short-{first}"]
        assert process.popen.wait(RUN_SECONDS) == 0, last_lines(process.log)


def assert_recorded_once(client: MlflowClient, name: str) -> None:
    """One run a part, ended; each metric point once; one version, the champion."""
    runs = client.search_runs([client.get_experiment_by_name(name).experiment_id])
    assert Counter((run.data.tags["sft.part"], run.info.status) for run in runs) == Counter(
        (part, "FINISHED") for part in PARTS
    )
    (train,) = [run.info.run_id for run in runs if run.data.tags["sft.part"] == "train"]
    assert sorted(point.step for point in client.get_metric_history(train, "train/loss")) == [1, 2, 3]
    (version,) = client.search_model_versions(f"name='{name}'")
    assert client.get_registered_model(name).aliases["champion"] == version.version


def test_both_databases_come_back_from_their_dumps(stack: Stack, database: Postgres, tmp_path: Path) -> None:
    before = contents(stack)
    assert {"first", "second"} <= before["models"].keys()
    for name in ("prefect", "mlflow"):
        dump = str(tmp_path / f"{name}.dump")
        database.run("pg_dump", "--format", "custom", "--file", dump, name)
        database.run("createdb", f"{name}_restored")
        database.run("pg_restore", "--exit-on-error", "--no-owner", "--dbname", f"{name}_restored", dump)
    artifacts = shutil.copytree(stack.folder / "mlartifacts", tmp_path / "mlartifacts")
    restored = Stack(tmp_path, **settings(database.url("prefect_restored", "postgresql+asyncpg")))
    try:
        restored.start(backend=database.url("mlflow_restored"), artifacts=str(artifacts))
        assert contents(restored) == before
        restored.sft("chat", "models:/first@champion")  # loads the model; nothing is asked
    finally:
        restored.stop()


def test_a_cron_left_alone_goes_on_after_a_restart_and_a_missed_night(stack: Stack) -> None:
    """Each night finds all of `first` in the store: it takes seconds, or every minute would bring one more at work."""
    active_cron(stack, "first.yaml")
    began = datetime.now(UTC)
    stack.sft("deploy")
    completed(stack, begun_since(stack, began))
    assert_a_missed_night_is_made_up_for(stack)
    switch_schedule(stack, on=False)
    assert champion(stack, "first") == (1, "1")


def contents(stack: Stack) -> dict[str, Any]:
    """What the two servers say they hold."""
    client = MlflowClient(stack.mlflow_url)
    deployments = stack.api("POST", "/deployments/filter", {})
    return {
        "flow runs": stack.api("POST", "/flow_runs/count", {"flow_runs": {"state": {"type": {"any_": ["COMPLETED"]}}}}),
        "deployments": sorted((deployment["id"], deployment["name"]) for deployment in deployments),
        "models": {model.name: dict(model.aliases) for model in client.search_registered_models()},
    }
