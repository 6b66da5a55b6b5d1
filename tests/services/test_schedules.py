"""A cron that is left alone ends in a registered version; over a missed night it is test_postgres.py's."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from tasks.automations import restart_forgotten
from tests.services.left_alone import (
    EVERY_MINUTE,
    active_cron,
    begun_since,
    champion,
    completed,
    switch_schedule,
    when,
)
from tests.services.stack import Stack, write_project


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Stack]:
    """Servers and one worker; the deployments come from `sft deploy`, which is all that a person does."""
    stack = Stack(write_project(tmp_path_factory.mktemp("schedules"), tiny_model))
    try:
        stack.start()
        stack.worker("cpu")
        stack.make_pool("gpu")
        yield stack
    finally:
        stack.stop()


def test_a_cron_ends_in_a_registered_version_with_nobody_starting_anything(stack: Stack) -> None:
    active_cron(stack)
    began = datetime.now(UTC)
    printed = stack.sft("deploy")
    (line,) = [line for line in printed.splitlines() if line.startswith("retrain/nightly")]
    assert line.startswith(f"retrain/nightly  cron {EVERY_MINUTE} Etc/UTC  next run 20")
    begun = begun_since(stack, began)
    switch_schedule(stack, on=False)  # one night is enough
    run = completed(stack, begun)
    assert when(run["expected_start_time"]).second == 0
    deployed = stack.api("POST", "/flow_runs/filter", {"flow_runs": {"deployment_id": {"is_null_": False}}})
    assert {run["created_by"]["type"] for run in deployed} == {"SCHEDULE"}, "somebody started a run"
    assert champion(stack, "orders") == (1, "1")


def test_a_scheduler_that_plans_nothing_is_an_error(stack: Stack) -> None:
    """As a server does whose scheduler fails: the schedule is on, and no run is made."""
    stack.processes["prefect"].kill()
    stack.environment["PREFECT_SERVER_SERVICES_SCHEDULER_ENABLED"] = "false"
    stack.start_prefect()
    switch_schedule(stack, on=True)
    with pytest.raises(AssertionError, match="status 1") as refused:
        stack.sft("deploy", "--check", "--wait", "8")
    assert (
        f"error: no run is planned of retrain/nightly (cron {EVERY_MINUTE} Etc/UTC): the schedule is on, and the "
        "Prefect server has made no run of it in 8 s"
    ) in str(refused.value)


def test_work_pools_that_are_not_there_are_named_before_anything_is_registered(stack: Stack) -> None:
    file = stack.folder / "elsewhere.yaml"
    file.write_text(
        (stack.folder / "prefect.yaml").read_text().replace("name: gpu\n      job", "name: a100\n      job")
    )
    with pytest.raises(AssertionError, match="status 1") as refused:
        stack.sft("deploy", "--prefect-file", str(file))
    assert "make them first: prefect work-pool create a100 --type process" in str(refused.value)


def test_a_crashed_retraining_that_the_automations_forgot_is_started_again(stack: Stack) -> None:
    """As after an event that the server lost: the run is Crashed, and nothing happens to it."""
    for automation in stack.api("POST", "/automations/filter", {}):
        stack.api("PATCH", f"/automations/{automation['id']}", {"enabled": False})
    began = datetime.now(UTC)
    later = began + timedelta(hours=1)  # no worker takes them meanwhile
    run = stack.run_deployment("retrain/on-demand", {"recipe": "no-such-recipe.yaml"}, later)
    never_started = stack.run_deployment("retrain/on-demand", {"recipe": "no-such-recipe.yaml"}, later)
    for number, states in ((run, ("RUNNING", "CRASHED")), (never_started, ("CRASHED",))):
        for state in states:
            stack.api("POST", f"/flow_runs/{number}/set_state", {"state": {"type": state}, "force": True})
    with temporary_settings({PREFECT_API_URL: f"{stack.prefect_url}/api"}):
        assert restart_forgotten(datetime.now(UTC), seconds=0) == []
        assert restart_forgotten(began) == []  # the automations still have time
        assert restart_forgotten(began, seconds=0) == [stack.flow_run(run)["name"]]
    states = [state["name"] for state in stack.api("GET", f"/flow_run_states/?flow_run_id={run}")]
    assert states.count("AwaitingRetry") == 1
    assert stack.flow_run(never_started)["state_name"] == "Crashed"
    assert "no-such-recipe.yaml" in stack.wait_final(run)["state"]["message"]
