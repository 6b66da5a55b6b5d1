"""A year of nights in minutes: two models, one server, its own scheduler; rows come and stay away, things break.

Nobody starts a run here. Schedules fire every NIGHT_SECONDS; the server plans a few nights ahead only, as it does with
real ones. Each model has a work queue and a worker that takes one run at a time, so a night that is due waits for it.
What happens: new rows, nights without any, rows taken out, a source that is gone, a killed server, killed workers,
nights that start late, a rollback. Afterwards the ledger of nights balances, night by night.

A night whose worker was killed stays Crashed here, and the next night does its work. Elsewhere it is started again
(test_kills.py): Prefect holds an event back for up to 15 minutes where the run's state of before is younger than five
minutes and came without an event, as it does for runs that were planned minutes ahead and not days.
"""

import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from cli.servers import start_prefect, wait_for
from tests.services.long_training import TRAINING, processes, wait_gone
from tests.services.postgres import Postgres, postgres
from tests.services.stack import RECIPE, RUN_SECONDS, Stack, wait_until, write_project, write_rows

DATES, LEAST_NIGHTS = 30, 26
"""Dates of each model's schedule, and how many of them must be left once the deployments are registered."""
NIGHT_SECONDS = 10
AHEAD = 8
"""Nights that the scheduler plans ahead; of a real nightly schedule it is three."""
FIRST_NIGHT_SECONDS = 20
"""From writing prefect.yaml to the schedule's first date."""
YEAR_SECONDS = 1400.0
"""Bound on all nights; 400 s on two idle cores."""
FINAL = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
MODELS = ("orders", "returns")
ROLLED_BACK = "orders"
SERVER = {
    "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "2",
    "PREFECT_SERVER_SERVICES_SCHEDULER_MIN_RUNS": str(AHEAD),
    "PREFECT_SERVER_SERVICES_SCHEDULER_MIN_SCHEDULED_TIME": "PT1S",
}


@dataclass
class Learned:
    """What one model is given to learn, in order: the number of rows and of optimizer steps."""

    name: str
    rows: int = 60
    steps: int = 3
    given: list[tuple[int, int]] = field(default_factory=list)

    @property
    def source(self) -> str:
        """The rows' file, below the project."""
        return f"{self.name}-{self.rows}.jsonl"

    def give(self, folder: Path, rows: int, steps: int) -> None:
        """New rows (or fewer), and a recipe of so many optimizer steps. A night reads the old ones or the new ones,
        never half of each: the recipe names the file, and is replaced in one move."""
        self.rows, self.steps = rows, steps
        text = RECIPE.replace("name: orders", f"name: {self.name}").replace("rows.jsonl", self.source)
        text = text.replace("max_steps: 3", f"max_steps: {steps}") + "schedule: {min_new_rows: 1}\n"
        text += f"seed: {MODELS.index(self.name)}\n"  # no two of the trainings are the same
        write_rows(folder / self.source, rows)
        (folder / "recipe.new").write_text(text)
        (folder / "recipe.new").rename(folder / f"{self.name}.yaml")


class Year:
    """The nights of all models, as the server has them."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.models = {name: Learned(name) for name in MODELS}
        self.dates: list[datetime] = []

    def deploy(self) -> None:
        """One deployment a model, its schedule on; `sft deploy` is the last thing that a person does."""
        first = (datetime.now(UTC) + timedelta(seconds=FIRST_NIGHT_SECONDS)).replace(microsecond=0)
        self.dates = [first + timedelta(seconds=NIGHT_SECONDS * number) for number in range(DATES)]
        rule = f"DTSTART:{first:%Y%m%dT%H%M%S}\\nRRULE:FREQ=SECONDLY;INTERVAL={NIGHT_SECONDS};COUNT={DATES}"
        text = "name: year\npull:\n  - prefect.deployments.steps.set_working_directory:\n"
        text += '      directory: "{{ $SFT_PROJECT_DIR }}"\ndeployments:\n'
        for name in MODELS:
            text += f"""
  - name: {name}
    entrypoint: sft_cli.deployments.retrain
    tags: [sft]
    parameters: {{recipe: {name}.yaml}}
    schedules: [{{slug: nightly, rrule: "{rule}", timezone: UTC, active: true}}]
    concurrency_limit: {{limit: 1, collision_strategy: ENQUEUE, grace_period_seconds: 600}}
    work_pool: {{name: cpu, work_queue_name: {name}}}
"""
        (self.stack.folder / "prefect.yaml").write_text(text)
        self.stack.sft("deploy", "--wait", "20")

    def nights(self, name: str) -> list[dict[str, Any]]:
        """Runs that the scheduler made for a model, by the time they were due."""
        deployment = self.stack.api("GET", f"/deployments/name/retrain/{name}")["id"]
        wanted = {"flow_runs": {"deployment_id": {"any_": [deployment]}}, "sort": "EXPECTED_START_TIME_ASC"}
        return list(self.stack.api("POST", "/flow_runs/filter", {**wanted, "limit": 200}))

    def wait_for_night(self, ended: Callable[[dict[str, Any]], bool], what: str) -> None:
        """Until each model has had a night that started from now on and ended as `ended` says."""
        now = datetime.now(UTC)
        for name in MODELS:

            def look(name: str = name) -> bool:
                nights = [night for night in self.nights(name) if night["start_time"]]
                found = any(datetime.fromisoformat(night["start_time"]) > now and ended(night) for night in nights)
                assert found or not self.over(name), f"{name}: the nights are over, none {what}"
                return found

            wait_until(look, RUN_SECONDS)

    def learned(self, name: str) -> int:
        """Versions that a model must have. After the rollback of `orders` the champion knows fewer rows than there are:
        what was skipped before is trained."""
        return len(self.models[name].given) + (name == ROLLED_BACK)

    def due(self, name: str) -> list[datetime]:
        """The schedule's dates from the first one on that was planned: those before it had passed at registering."""
        first = datetime.fromisoformat(self.nights(name)[0]["expected_start_time"])
        return [date for date in self.dates if date >= first]

    def over(self, name: str) -> bool:
        """Whether the last night has been planned, and all have ended."""
        nights = self.nights(name)
        planned = datetime.fromisoformat(nights[-1]["expected_start_time"]) == self.dates[-1]
        return planned and all(night["state_type"] in FINAL for night in nights)

    def learn(self, rows: int, steps: int) -> None:
        """New rows or a better recipe; returns when each model has a version of it."""
        for model in self.models.values():
            model.give(self.stack.folder, rows, steps)
            model.given.append((rows, steps))
        for name, model in self.models.items():
            wait_until(lambda name=name, model=model: len(self.versions(name)) == len(model.given), RUN_SECONDS)

    def versions(self, name: str) -> list[Any]:
        """Registered versions whose registration was finished, oldest first."""
        found = MlflowClient(self.stack.mlflow_url).search_model_versions(f"name='{name}'")
        return sorted((entry for entry in found if "sft.settled" in entry.tags), key=lambda entry: int(entry.version))


@pytest.fixture(scope="module")
def database() -> Iterator[Postgres]:
    """As a team has it. On SQLite the server loses events while it is busy, and with them restarts of crashed runs
    (docs/operations.md)."""
    with postgres("prefect", "mlflow") as server:
        yield server


@pytest.fixture(scope="module")
def year(database: Postgres, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Year]:
    """All nights, with what happens in them."""
    url = database.url("prefect", "postgresql+asyncpg")
    folder = write_project(tmp_path_factory.mktemp("year"), tiny_model)
    stack = Stack(folder, **SERVER, PREFECT_SERVER_DATABASE_CONNECTION_URL=url)
    try:
        stack.start(backend=database.url("mlflow"))
        stack.prefect("work-pool", "create", "cpu", "--type", "process")
        year = Year(stack)
        for model in year.models.values():
            model.give(stack.folder, 60, 3)
        year.deploy()
        start_workers(stack)
        live(year)
        yield year
    finally:
        stack.stop()


def live(year: Year) -> None:
    """What happens in this year."""
    stack = year.stack
    year.learn(rows=60, steps=3)
    year.learn(rows=66, steps=12)  # better
    year.wait_for_night(completed, "without anything new")

    for model in year.models.values():
        (stack.folder / model.source).rename(stack.folder / f"{model.name}-away")
    year.wait_for_night(failed, "failed")
    for model in year.models.values():
        (stack.folder / f"{model.name}-away").rename(stack.folder / model.source)
    year.learn(rows=70, steps=12)  # no better

    stack.processes["prefect"].kill()
    time.sleep(2 * NIGHT_SECONDS)  # nights that nobody starts
    stack.processes["prefect"] = start_prefect(stack.folder, stack.prefect_port, stack.environment)
    wait_for(stack.processes["prefect"], f"{stack.prefect_url}/api/health")
    year.wait_for_night(completed, "completed after the server's restart")

    kill_workers_in_training(year, rows=76, steps=60)
    for model in year.models.values():
        model.give(stack.folder, model.rows - 2, model.steps)  # rows were taken out: nothing new to learn
    year.wait_for_night(skipped, "skipped")

    stack.sft("models", "rollback", ROLLED_BACK, "--reason", "it forgot French")
    wait_until(lambda: all(year.over(name) for name in MODELS), YEAR_SECONDS)


def start_workers(stack: Stack) -> None:
    """One a model, as a machine with one GPU has it."""
    for name in MODELS:
        stack.worker("cpu", 1, queue=name)


def kill_workers_in_training(year: Year, rows: int, steps: int) -> None:
    """SIGKILL to the workers while a training is at work; others come when nights are late."""
    stack = year.stack
    for model in year.models.values():
        model.give(stack.folder, rows, steps)
        model.given.append((rows, steps))
    wait_until(lambda: processes(stack, TRAINING), RUN_SECONDS, 0.1)
    for name in [name for name in stack.processes if name.startswith("cpu")]:
        os.kill(stack.processes.pop(name).popen.pid, signal.SIGKILL)
    wait_gone(stack, TRAINING)
    wait_until(lambda: all(any(n["state_name"] == "Late" for n in year.nights(m)) for m in MODELS), RUN_SECONDS)
    start_workers(stack)
    for name, model in year.models.items():
        wait_until(lambda name=name, model=model: len(year.versions(name)) == len(model.given), RUN_SECONDS)


def completed(night: dict[str, Any]) -> bool:
    return bool(night["state_name"] == "Completed")


def failed(night: dict[str, Any]) -> bool:
    return bool(night["state_name"] == "Failed")


def skipped(night: dict[str, Any]) -> bool:
    return bool(night["state_name"] == "Skipped")


@pytest.mark.parametrize("name", MODELS)
def test_every_night_that_was_due_ran_once_and_ended(year: Year, name: str) -> None:
    nights = year.nights(name)
    due = year.due(name)
    assert len(due) >= LEAST_NIGHTS
    assert [datetime.fromisoformat(night["expected_start_time"]) for night in nights] == due
    assert {night["created_by"]["type"] for night in nights} == {"SCHEDULE"}
    states = Counter(night["state_name"] for night in nights)
    print(name, dict(states))
    assert states["Completed"] + states["Skipped"] + states["Failed"] + states["Crashed"] == len(due), states
    assert states["Crashed"] <= 1, "one worker of each model was killed, once"
    assert min(states["Completed"], states["Skipped"], states["Failed"]) > 0, states
    for night in nights:
        if failed(night):
            assert f"{name}-66.jsonl" in night["state"]["message"], night["state"]


@pytest.mark.parametrize("name", MODELS)
def test_each_thing_to_learn_became_one_version(year: Year, name: str) -> None:
    versions = year.versions(name)
    assert [int(entry.version) for entry in versions] == list(range(1, year.learned(name) + 1))
    assert len({entry.tags["sft.merged_fingerprint"] for entry in versions}) == len(versions)
    for step in ("train", "convert", "merge"):
        made = [path.parent.name for path in (year.stack.folder / "store" / step).glob("*/manifest.json")]
        assert len(made) == len(set(made)) == sum(map(year.learned, MODELS)), step


@pytest.mark.parametrize("name", MODELS)
def test_the_champions_history_is_what_the_verdicts_and_the_rollback_say(year: Year, name: str) -> None:
    client = MlflowClient(year.stack.mlflow_url)
    champion, expected = "none", []
    for entry in year.versions(name):
        assert entry.tags["sft.judged_against"] == champion
        if entry.tags["sft.promote"] == "true":
            expected.append(f"{champion} -> {entry.version}")
            champion = str(entry.version)
        if name == ROLLED_BACK and int(entry.version) == len(year.models[name].given):
            assert expected[-1].endswith(f"-> {champion}")
            before = expected[-1].partition(" ->")[0]
            expected.append(f"rolled back from {champion} to {before}")
            champion = before
    assert len(expected) >= 3, expected
    model = client.get_registered_model(name)
    history = [words for key, words in sorted(model.tags.items()) if key.startswith("sft.history.")]
    assert [words.partition(":")[0].partition(" by ")[0] for words in history] == expected
    assert str(model.aliases["champion"]) == champion


def test_nothing_was_left_over_and_nothing_grew_that_should_not(year: Year, database: Postgres) -> None:
    """Flow runs: what each kind of night needs, and what the killed workers' nights had begun. MLflow: one ended run a
    retraining and part. The store: whole artifacts only."""
    states = Counter(night["state_name"] for name in MODELS for night in year.nights(name))
    query = "select flow.name, count(*) from flow_run join flow on flow.id = flow_run.flow_id group by flow.name"
    runs = {name: int(count) for name, _, count in (row.partition("|") for row in database.ask("prefect", query))}
    print(dict(states), runs)
    assert runs["retrain"] == sum(states.values())
    crashed = states["Crashed"]
    assert crashed >= 1
    assert 0 <= runs["prepare"] - states["Completed"] - states["Skipped"] <= crashed
    assert 0 <= runs["train"] - states["Completed"] <= crashed
    assert 0 <= runs["publish"] - states["Completed"] <= crashed
    client = MlflowClient(year.stack.mlflow_url)
    for name in MODELS:
        found = client.search_runs([client.get_experiment_by_name(name).experiment_id])
        parts = Counter((run.data.tags["sft.part"], run.info.status) for run in found)
        trained = year.learned(name)
        prepared = len(year.models[name].given) + 1  # and the one that was skipped
        assert parts == {
            ("retraining", "FINISHED"): prepared,
            ("prepare", "FINISHED"): prepared,
            ("train", "FINISHED"): trained,
            ("publish", "FINISHED"): trained,
        }
    assert list((year.stack.folder / "store" / ".staging").glob("*")) == []
    year.stack.sft("store", "verify", "store")  # every file of every artifact, by its hash
