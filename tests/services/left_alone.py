"""A schedule that is left alone: the server's own scheduler makes its runs. Nothing is started here, only read."""

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mlflow.tracking import MlflowClient

from tests.services.stack import ROOT, RUN_SECONDS, Stack, wait_until

EVERY_MINUTE = "* * * * *"
PLANNED_SECONDS = 180.0
"""Bound on the scheduler's next look, a minute apart."""


def active_cron(stack: Stack, recipe: str = "recipe.yaml") -> Path:
    """The project's prefect.yaml with retrain/nightly switched on, every minute; in the stack's folder."""
    text = (ROOT / "prefect.yaml").read_text()
    for before, after in (
        (
            'cron: "0 3 * * *", timezone: Etc/UTC, active: false',
            f'cron: "{EVERY_MINUTE}", timezone: Etc/UTC, active: true',
        ),
        ("parameters: {recipe: demo}\n    schedules", f"parameters: {{recipe: {recipe}}}\n    schedules"),
    ):
        assert text.count(before) == 1, before
        text = text.replace(before, after)
    file = stack.folder / "prefect.yaml"
    file.write_text(text)
    return file


def nightly_runs(stack: Stack) -> list[dict[str, Any]]:
    """Runs that the scheduler made, in the order of their time; those of the future included."""
    wanted = {"flow_runs": {"deployment_id": {"is_null_": False}}, "sort": "EXPECTED_START_TIME_ASC", "limit": 200}
    runs = stack.api("POST", "/flow_runs/filter", wanted)
    return [run for run in runs if (run["created_by"] or {}).get("type") == "SCHEDULE"]


def begun_since(stack: Stack, moment: datetime) -> dict[str, Any]:
    """The first run due after `moment`, once a worker has taken it."""

    def look() -> dict[str, Any] | None:
        due = [run for run in nightly_runs(stack) if when(run["expected_start_time"]) > moment]
        return due[0] if due and due[0]["state_type"] != "SCHEDULED" else None

    return wait_until(look, PLANNED_SECONDS + RUN_SECONDS)


def completed(stack: Stack, run: dict[str, Any]) -> dict[str, Any]:
    """The run once it has ended, which must be Completed."""
    ended = stack.wait_final(run["id"])
    assert ended["state_type"] == "COMPLETED", (ended["state"], stack.logs(run["id"]))
    return ended


def when(text: str) -> datetime:
    """A time of the API."""
    return datetime.fromisoformat(text)


def assert_each_minute_once(stack: Stack) -> None:
    """From the first run that ended to the last one: one run for each minute, all Completed."""
    ended = [run for run in nightly_runs(stack) if run["state_type"] == "COMPLETED"]
    minutes = [int(when(run["expected_start_time"]).timestamp()) for run in ended]
    assert minutes == list(range(minutes[0], minutes[-1] + 60, 60))


def champion(stack: Stack, name: str) -> tuple[int, str]:
    """How many versions there are, and which is the champion."""
    client = MlflowClient(stack.mlflow_url)
    return len(client.search_model_versions(f"name='{name}'")), client.get_registered_model(name).aliases["champion"]


def switch_schedule(stack: Stack, *, on: bool) -> None:
    """The nightly's."""
    nightly = stack.api("GET", "/deployments/name/retrain/nightly")
    stack.api("PATCH", f"/deployments/{nightly['id']}/schedules/{nightly['schedules'][0]['id']}", {"active": on})


def assert_a_missed_night_is_made_up_for(stack: Stack) -> None:
    """The server is killed and away at the time of a night: that night runs once it is back, more are planned, and each
    minute has had its run."""
    now = datetime.now(UTC)
    missed = next(run for run in nightly_runs(stack) if when(run["expected_start_time"]) > now)
    stack.processes["prefect"].kill()
    due = when(missed["expected_start_time"])
    time.sleep(max(0.0, (due - datetime.now(UTC)).total_seconds()) + 1)
    back = datetime.now(UTC)
    stack.start_prefect()
    made_up = completed(stack, missed)
    assert when(made_up["start_time"]) > back > due
    wait_until(lambda: any(when(run["created"]) > back for run in nightly_runs(stack)), PLANNED_SECONDS)
    completed(stack, begun_since(stack, due))
    assert "next run 20" in stack.sft("deploy", "--check")
    assert_each_minute_once(stack)
