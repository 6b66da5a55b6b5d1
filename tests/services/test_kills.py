"""`kill -9` of everything in mid-training: one retraining survives it all and gives what an undisturbed one gives."""

import hashlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from tasks.automations import MARK, NEVER_STARTED, NO_HEARTBEAT, RESTART, register_automations
from tests.services.long_training import (
    SAVE_STEPS,
    STARTED_SECONDS,
    TRAINING,
    attempts,
    kill_flow,
    kill_host,
    mlflow_statuses,
    resumptions,
    store_of,
    train_undisturbed,
    wait_for_part,
    wait_for_step,
    wait_gone,
    write_long_recipe,
)
from tests.services.postgres import postgres
from tests.services.stack import RUN_SECONDS, Stack, wait_until, write_project

HEARTBEAT_SECONDS = 30
"""Prefect's least; a run is given up after three times that."""
RESTART_SECONDS = 20
AUTOMATIONS = (NO_HEARTBEAT, NEVER_STARTED, MARK, RESTART)
ADAPTER = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Stack]:
    """Servers, automations, deployments, a worker of `cpu`; each worker stands for a machine of its own.

    Prefect's server is on PostgreSQL: on SQLite it drops events under load, restarts among them (docs/operations.md).
    """
    with postgres("prefect") as database:
        url = database.url("prefect", "postgresql+asyncpg")
        settings = {
            "PREFECT_SERVER_DATABASE_CONNECTION_URL": url,
            "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_SECONDS),
        }
        stack = Stack(write_project(tmp_path_factory.mktemp("kills"), tiny_model), **settings)
        try:
            stack.start()
            stack.worker("cpu")
            stack.make_pool("gpu")
            stack.deploy()
            with temporary_settings({PREFECT_API_URL: f"{stack.prefect_url}/api"}):
                for _ in range(2):  # the second time finds and keeps them
                    register_automations(HEARTBEAT_SECONDS, restart_seconds=RESTART_SECONDS)
            yield stack
        finally:
            stack.stop()


def test_a_retraining_survives_every_kill(hosts: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    known = [automation["name"] for automation in hosts.api("POST", "/automations/filter", {})]
    assert sorted(name for name in known if name.startswith("sft: ")) == sorted(AUTOMATIONS)
    recipe = write_long_recipe(hosts, "killed")
    store = store_of(hosts, "killed")
    parent = hosts.run_deployment("retrain/on-demand", {"recipe": recipe})

    kill_waiting_parent(hosts, parent)
    host = hosts.worker("gpu", limit=1)
    first = wait_for_part(hosts, parent, "train")
    assert len(attempts(hosts, parent, "train")) == 1  # the restarted parent found it

    wait_for_step(store, 2 * SAVE_STEPS)  # the one before it is complete
    kill_flow(first)
    second = wait_for_part(hosts, parent, "train", 2)
    assert hosts.flow_run(first["id"])["state_type"] == "CRASHED"

    reached = wait_for_step(store, 4 * SAVE_STEPS)
    assert resumptions(store) == 1
    kill_host(hosts, host.name)
    wait_gone(hosts, TRAINING)
    host = hosts.worker("gpu", limit=1)  # another machine
    wait_for_part(hosts, parent, "train", 3)
    assert "No sign of life" in hosts.flow_run(second["id"])["state"]["message"]

    wait_for_step(store, reached + SAVE_STEPS)
    assert resumptions(store) == 2
    kill_flow(hosts.flow_run(parent))
    os.kill(host.popen.pid, signal.SIGKILL)
    wait_gone(hosts, TRAINING)
    hosts.worker("gpu", limit=1)

    assert hosts.wait_final(parent)["state_type"] == "CRASHED"
    wait_until(lambda: hosts.flow_run(parent)["state_type"] == "COMPLETED", RUN_SECONDS)
    runs = attempts(hosts, parent, "train")
    assert [run["state_type"] for run in runs] == ["CRASHED", "CRASHED", "CRASHED", "COMPLETED"]
    assert any("resuming from checkpoint-" in line for line in hosts.logs(runs[3]["id"]))
    statuses = mlflow_statuses(hosts, "killed")
    assert statuses == {part: ["FINISHED"] for part in ("retraining", "prepare", "train", "publish")}
    monkeypatch.chdir(hosts.folder)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert digest(store) == digest(train_undisturbed(hosts.folder, recipe, store))


def kill_waiting_parent(stack: Stack, parent: str) -> None:
    """SIGKILL to the parent once its part waits for a worker; returns when it is at work again."""
    waits = "no worker of the work pool 'gpu' is online"
    wait_until(lambda: any(waits in line for line in stack.logs(parent)), STARTED_SECONDS)
    kill_flow(stack.flow_run(parent))
    wait_until(lambda: stack.flow_run(parent)["run_count"] == 2, STARTED_SECONDS)


def digest(store: Path) -> str:
    """SHA-256 of the one adapter's weights in a store."""
    (adapter,) = (store / "convert").rglob(ADAPTER)
    return hashlib.sha256(adapter.read_bytes()).hexdigest()
