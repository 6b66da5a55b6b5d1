"""A person at a terminal stops `sft run`, in each of its parts: soon, in one line, with nothing lost or left behind."""

import json
import os
import re
import signal
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.services.long_training import TRAINING, train_undisturbed
from tests.services.stack import RECIPE, Stack, wait_until, write_project
from tests.terminal import CTRL_C, Terminal

STEPS = 300
LONG = RECIPE.replace("max_steps: 3", f"max_steps: {STEPS}")
SLOW_MACHINE = 60.0
"""Bound on a stop. On two idle cores each part takes 1 to 6 s (docs/LOG.md); 8 s and 5 s are `sft run`'s own bounds,
and 30 s that of a training that saves."""
GONE_SECONDS = 30.0
START = Callable[..., Terminal]
AT_WORK = r"step \d+/"
PARTS = {
    "planning": ("planning orders", "stopped while planning; nothing was begun|stopped before fetch/0 was done; .*"),
    "starting": ("starting Prefect", "stopped before fetch/0 was done; the same command goes on"),
    "prepare": ("Beginning subflow run 'prepare", "stopped before (fetch/0|normalize|pack|train) was done; .*"),
    "train": (r"step 2\d/", rf"stopped at optimizer step \d+ of {STEPS}, saved; the same command goes on"),
    "merge": (" convert: ", "stopped before (merge|evaluate/tuned) was done; fetch/0, normalize, pack, train, .*"),
    "evaluate": (" merge: ", "stopped before (evaluate/tuned|evaluate/base) was done; .*"),
    "register": (r"evaluate/base:\s+\w{12} in ", "stopped before register was done; every step before it .*|stopped"),
}
"""What is shown once a part is at work, and the last line after Ctrl-C then."""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A recipe whose runs are stopped again and again. Each part can be reached from wherever the last test ended."""
    return write_project(tmp_path_factory.mktemp("stopped"), tiny_model, recipe=LONG)


@pytest.fixture
def start() -> Iterator[START]:
    """Starts commands in terminals, and ends what is left of them."""
    started: list[Terminal] = []

    def terminal(folder: Path, *arguments: str, **settings: str) -> Terminal:
        started.append(Terminal(folder, *arguments, **settings))
        return started[-1]

    yield terminal
    for command in started:
        command.close()


def mlflow_statuses(project: Path) -> set[str]:
    """Of all MLflow runs of the project."""
    if not (project / "mlflow.db").exists():
        return set()
    with sqlite3.connect(project / "mlflow.db") as database:
        return {status for (status,) in database.execute("SELECT status FROM runs")}


def assert_ended_in_order(command: Terminal, status: int) -> str:
    """The command ended with `status`, a line, and nothing left; what it printed last."""
    assert command.wait_end(SLOW_MACHINE) == status, command.shown[-3000:]
    wait_until(lambda: not command.left(), GONE_SECONDS)
    last = command.shown.rstrip("\n").splitlines()[-1]
    assert "Traceback" not in command.shown
    assert last.startswith("stopped"), command.shown[-3000:]
    assert "RUNNING" not in mlflow_statuses(command.folder)
    assert not list((command.folder / "store" / ".staging").glob("*"))
    return last


@pytest.mark.parametrize("part", ["planning", "starting", "prepare", "train"])
def test_ctrl_c_ends_every_part(project: Path, start: START, part: str) -> None:
    stop_by_ctrl_c(project, start, part)


def test_a_closed_terminal_stops_it_too(project: Path, start: START) -> None:
    again = start(project, "run", "recipe.yaml")
    again.wait_for("resuming from checkpoint-")
    again.wait_for(AT_WORK)
    again.hang_up()
    assert again.wait_end(SLOW_MACHINE) == 129
    wait_until(lambda: not again.left(), GONE_SECONDS)
    assert mlflow_statuses(project) == {"FINISHED", "KILLED"}


@pytest.mark.parametrize("part", ["merge", "evaluate", "register"])
def test_ctrl_c_ends_every_later_part(project: Path, start: START, part: str) -> None:
    stop_by_ctrl_c(project, start, part)


def test_the_same_command_then_ends_as_an_undisturbed_one(
    project: Path, start: START, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = start(project, "run", "recipe.yaml")
    command.wait_for("verdict ")
    assert command.wait_end(SLOW_MACHINE) == 0
    assert "orders version 1 " in command.shown
    assert mlflow_statuses(project) == {"FINISHED"}
    monkeypatch.chdir(project)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    stores = project / "store", train_undisturbed(project, "recipe.yaml", project / "store")
    ours, theirs = ([path.read_bytes() for path in (store / "convert").rglob("*.safetensors")] for store in stores)
    assert len(ours) == 1
    assert ours == theirs


def stop_by_ctrl_c(project: Path, start: START, part: str) -> None:
    """One line is shown, and no more after the key."""
    shown, last = PARTS[part]
    command = start(project, "run", "recipe.yaml")
    command.wait_for(shown)
    at = len(command.shown)
    command.press(CTRL_C)
    assert re.fullmatch(last, assert_ended_in_order(command, 130))
    after = command.shown[at:].split("^C", 1)[-1]
    assert [line for line in after.splitlines() if line and not line.startswith("stop")] == []


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A recipe whose training lasts: each test goes on where the last one ended."""
    return write_project(tmp_path_factory.mktemp("endless"), tiny_model, recipe=LONG.replace(str(STEPS), "5000"))


def test_sigterm_stops_it_too_with_a_prefect_server_of_its_own_where_the_run_ends(
    servers: Stack, endless: Path, start: START
) -> None:
    command = start(endless, "run", "recipe.yaml", PREFECT_API_URL=servers.environment["PREFECT_API_URL"])
    command.wait_for(AT_WORK)
    command.send(signal.SIGTERM)
    assert re.fullmatch(r"stopped at optimizer step \d+ of 5000, saved; .*", assert_ended_in_order(command, 143))
    states = {run["name"]: run["state_type"] for run in servers.api("POST", "/flow_runs/filter", {})}
    assert json.dumps(states, sort_keys=True) == (
        '{"prepare orders": "COMPLETED", "retrain recipe": "CRASHED", "train orders": "CRASHED"}'
    )


def test_a_second_ctrl_c_ends_it_at_once(endless: Path, start: START) -> None:
    """The training is held by SIGSTOP: it cannot save."""
    command = start(endless, "run", "recipe.yaml")
    command.wait_for(AT_WORK)
    (rank,) = [pid for pid in command.left() if TRAINING in Path(f"/proc/{pid}/cmdline").read_text()]
    os.kill(rank, signal.SIGSTOP)
    command.press(CTRL_C)
    command.wait_for("stopping; Ctrl-C again ends it at once", SLOW_MACHINE)
    command.press(CTRL_C)
    assert command.wait_end(5) == 130
    wait_until(lambda: not command.left(), GONE_SECONDS)


def test_nothing_outlives_a_killed_run(endless: Path, start: START) -> None:
    command = start(endless, "run", "recipe.yaml")
    command.wait_for(AT_WORK)
    sessions = {os.getsid(pid) for pid in command.left()}
    assert len(sessions) >= 3  # the command, Prefect's server, the training
    command.send(signal.SIGKILL)
    assert command.wait_end(SLOW_MACHINE) == -signal.SIGKILL
    wait_until(lambda: not command.left(), GONE_SECONDS)
