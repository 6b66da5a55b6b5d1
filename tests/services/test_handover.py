"""A part goes to another work pool: waiting is explained, one training runs at a time, faults end with one message."""

import pytest

from cli.servers import start_worker
from tests.services.long_training import attempts, mlflow_statuses, write_long_recipe
from tests.services.stack import Stack, wait_until

TRAIN_ON_GPU = {"compute": {"train": "train/gpu"}}
RETRY = {"state": {"type": "SCHEDULED", "name": "AwaitingRetry"}, "force": False}
WAIT_SECONDS = 300.0


@pytest.fixture(scope="module")
def cpu_only(servers: Stack) -> Stack:
    """Servers, deployments, a worker of `cpu`; the pool `gpu` allows one run and has no worker."""
    servers.api("PATCH", "/work_pools/gpu", {"concurrency_limit": 1})
    servers.worker("cpu")
    return servers


def test_one_training_at_a_time(cpu_only: Stack) -> None:
    """Two retrainings at once, two machines with a GPU each, a pool that allows one run."""
    stack = cpu_only
    names = {name: write_long_recipe(stack, name, steps=20) for name in ("left", "right")}
    parents = {
        "left": stack.run_deployment("retrain/on-demand", {"recipe": names["left"]}),
        "right": stack.run_deployment("retrain/nightly", {"recipe": names["right"]}),
    }

    def told(parent: str) -> bool:
        return any("no worker of the work pool 'gpu' is online" in line for line in stack.logs(parent))

    wait_until(lambda: all(map(told, parents.values())), WAIT_SECONDS)
    assert all(stack.flow_run(parent)["state_type"] == "RUNNING" for parent in parents.values())
    for name in ("gpu-one", "gpu-two"):
        stack.processes[name] = start_worker("gpu", stack.folder, stack.environment, limit=1, name=name)

    assert [stack.wait_final(parent)["state_type"] for parent in parents.values()] == ["COMPLETED", "COMPLETED"]
    trainings = [run for parent in parents.values() for run in attempts(stack, parent, "train")]
    assert len(trainings) == 2
    first, second = sorted(trainings, key=lambda run: run["start_time"])
    assert first["end_time"] <= second["start_time"]
    for name in names:
        finished = {part: ["FINISHED"] for part in ("retraining", "prepare", "train", "publish")}
        assert mlflow_statuses(stack, name) == finished


def test_a_deployment_that_is_not_there(cpu_only: Stack) -> None:
    parameters = {"recipe": "recipe.yaml", "compute": {"prepare": "prepare/nowhere"}}
    ended = cpu_only.wait_final(cpu_only.run_deployment("retrain/on-demand", parameters))
    assert ended["state_type"] == "FAILED"
    assert "compute.prepare: there is no deployment 'prepare/nowhere'" in ended["state"]["message"]


def test_a_users_fault_is_not_tried_again_until_the_parent_is(cpu_only: Stack) -> None:
    """The recipe asks for what this worker's machine cannot do, which the parent's cannot know."""
    stack = cpu_only
    parameters = {"recipe": "recipe.yaml", "train": {"dtype": "float16"}, **TRAIN_ON_GPU}
    parent = stack.run_deployment("retrain/on-demand", parameters)
    ended = stack.wait_final(parent)
    assert ended["state_type"] == "FAILED"
    assert "train/gpu: flow run" in ended["state"]["message"]
    assert "train.dtype float16: needs a GPU" in ended["state"]["message"]
    assert [run["state_type"] for run in attempts(stack, parent, "train")] == ["FAILED"]

    stack.api("POST", f"/flow_runs/{parent}/set_state", RETRY)  # as the button in the UI does
    wait_until(lambda: len(attempts(stack, parent, "train")) == 2, WAIT_SECONDS)
    assert stack.wait_final(parent)["state_type"] == "FAILED"
    assert [run["state_type"] for run in attempts(stack, parent, "train")] == ["FAILED", "FAILED"]
    assert mlflow_statuses(stack, "orders")["train"] == ["FAILED"]
