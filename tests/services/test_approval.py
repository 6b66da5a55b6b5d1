"""`register.approval: manual` on real servers: the gate's event, a run that waits without a process, answers."""

import os
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from tests.services.stack import RUN_SECONDS, Stack, wait_until


@pytest.fixture(scope="module")
def asked(servers: Stack) -> Stack:
    """Servers, a worker of `cpu`, the deployments; `sft run` left version 1 to a person."""
    servers.worker("cpu")
    said = servers.sft("run", "recipe.yaml", "--set", "register.approval=manual")
    assert "approval  waiting until " in said
    assert "sft models promote orders 1 --reason" in said
    return servers


@pytest.fixture
def registry(servers: Stack) -> MlflowClient:
    return MlflowClient(servers.mlflow_url)


def promotions(stack: Stack, **wanted: Any) -> list[dict[str, Any]]:
    """Flow runs of `promote`, oldest first."""
    filters = {"flows": {"name": {"any_": ["promote"]}}, "flow_runs": wanted, "sort": "START_TIME_ASC"}
    return list(stack.api("POST", "/flow_runs/filter", filters))


def waiting(stack: Stack, version: str) -> dict[str, Any]:
    """The run that is suspended and asks about this version."""

    def look() -> dict[str, Any] | None:
        paused = promotions(stack, state={"type": {"any_": ["PAUSED"]}})
        return next((run for run in paused if run["parameters"]["version"] == version), None)

    return wait_until(look, RUN_SECONDS)


def resume(stack: Stack, run_id: str, **answer: str) -> str:
    """Answer as the UI does; what the server did with it."""
    return str(stack.api("POST", f"/flow_runs/{run_id}/resume", {"run_input": answer})["status"])


def champion(registry: MlflowClient) -> str | None:
    aliases = registry.get_registered_model("orders").aliases
    return str(aliases["champion"]) if "champion" in aliases else None


def test_the_gate_asks_a_person_and_promotes_on_approval(asked: Stack, registry: MlflowClient) -> None:
    run = waiting(asked, "1")
    assert run["state_name"] == "Suspended"
    assert champion(registry) is None
    assert registry.get_model_version("orders", "1").tags["sft.approval_run"] == run["id"]
    shown = asked.api("GET", f"/flow_runs/{run['id']}/input/suspended-approval-description")
    assert "| base | loss |" in shown
    wait_until(lambda: not_running(run["infrastructure_pid"]), RUN_SECONDS)

    (deadline,) = promotions(asked, tags={"all_": ["deadline"]})
    until = datetime.fromisoformat(registry.get_model_version("orders", "1").tags["sft.approval_until"])
    assert deadline["state_type"] == "SCHEDULED"
    assert datetime.fromisoformat(deadline["next_scheduled_start_time"]) == until

    second = asked.wait_final(
        asked.run_deployment("promote/on-approval", {"model_name": "orders", "version": "candidate"})
    )
    assert second["state_name"] == "Asked", asked.logs(second["id"])

    assert resume(asked, run["id"], decision="approve", reason="reads well") == "REJECT"  # without a name
    assert resume(asked, run["id"], decision="approve", who="Ada", reason="reads well") == "ACCEPT"
    end = asked.wait_final(run["id"])
    assert (end["state_type"], end["state_name"]) == ("COMPLETED", "Approved"), asked.logs(run["id"])
    assert champion(registry) == "1"
    history = [v for k, v in registry.get_registered_model("orders").tags.items() if k.startswith("sft.history.")]
    assert history == [f"none -> 1: approved by Ada in flow run {run['id']}: reads well"]
    assert asked.flow_run(deadline["id"])["state_type"] == "CANCELLED"


def test_nobody_answers(asked: Stack, registry: MlflowClient) -> None:
    add_version(registry, "2")
    asked.run_deployment("promote/on-approval", {"model_name": "orders", "version": "2"})
    run = waiting(asked, "2")
    past = datetime.now(UTC) - timedelta(seconds=1)
    registry.set_model_version_tag("orders", "2", "sft.approval_until", past.isoformat())
    second = asked.run_deployment("promote/on-approval", {"model_name": "orders", "version": "2"})  # as the deadline's
    assert asked.wait_final(second)["state_name"] == "Expired", asked.logs(second)
    end = asked.flow_run(run["id"])
    assert (end["state_type"], end["state_name"]) == ("CANCELLED", "Expired")
    assert champion(registry) == "1"
    assert registry.get_model_version("orders", "2").tags["sft.approval_words"] == "nobody answered in time"


def test_approved_after_the_champion_moved(asked: Stack, registry: MlflowClient) -> None:
    add_version(registry, "3")
    asked.run_deployment("promote/on-approval", {"model_name": "orders", "version": "3"})
    run = waiting(asked, "3")
    registry.set_registered_model_alias("orders", "champion", "2")
    assert resume(asked, run["id"], decision="approve", who="Ada", reason="reads well") == "ACCEPT"
    end = asked.wait_final(run["id"])
    assert (end["state_type"], end["state_name"]) == ("FAILED", "Refused"), asked.logs(run["id"])
    assert "judged against 1, the champion is 2" in end["state"]["message"]
    assert champion(registry) == "2"


def add_version(registry: MlflowClient, number: str) -> None:
    """A copy of version 1 that passed the gate against champion 1 and waits."""
    first = registry.get_model_version("orders", "1")
    until = datetime.now(UTC) + timedelta(hours=72)
    tags = {
        **{key: value for key, value in first.tags.items() if not key.startswith("sft.approval")},
        "sft.merged_fingerprint": number * 64,
        "sft.judged_against": "1",
        "sft.approval": "waiting",
        "sft.approval_until": until.isoformat(timespec="seconds"),
    }
    model_id = first.source.removeprefix("models:/")
    made = registry.create_model_version("orders", first.source, first.run_id, tags, model_id=model_id)
    assert str(made.version) == number


def not_running(pid: str | None) -> bool:
    """`host:pid` of a process of this machine that has ended."""
    assert pid is not None
    with suppress(ProcessLookupError):
        os.kill(int(pid.rpartition(":")[2]), 0)
        return False
    return True
