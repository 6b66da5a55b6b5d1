"""`sft up` as a user sees it: what it starts and prints, that it keeps data, and that nothing of it is left behind."""

import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from cli.servers import HOST, end_marked, free_port, is_free, marked
from tests.cli.test_server_log import LINES
from tests.services.stack import ROOT, wait_until

READY_SECONDS = 600.0
"""Bound on the start of everything; 40 s on two idle cores."""
END_SECONDS = 360.0
"""Bound on the end of everything; 10 s on two idle cores."""

IMPATIENT = "import cli.up; cli.up.SCHEDULED_SECONDS = 8.0; from cli.main import main; main()"
"""`sft` whose `up` waits 8 s, not two minutes, for the server's planning."""


class Up:
    """`sft up` in a folder, with what it printed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.printed = folder / "printed"
        self.prefect, self.mlflow = free_port(), free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self.settings: dict[str, str] = {}
        self.program = ["-m", "cli.main"]

    def command(self, *options: str) -> list[str]:
        ports = ["--prefect-port", str(self.prefect), "--mlflow-port", str(self.mlflow)]
        return [sys.executable, *self.program, "up", *ports, "--drain", "5", *options]

    def environment(self) -> dict[str, str]:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_"))}
        return {**inherited, **self.settings, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def start(self) -> None:
        """Returns when it says that all is there."""
        with self.printed.open("wb") as file:
            self.process = subprocess.Popen(
                self.command(), cwd=self.folder, env=self.environment(), stdout=file, stderr=subprocess.STDOUT
            )
        wait_until(lambda: "Ctrl-C stops everything" in self.text() or self.process.poll() is not None, READY_SECONDS)
        assert self.process.poll() is None, self.text()

    def run(self, *options: str) -> subprocess.CompletedProcess[str]:
        """One that ends by itself."""
        return subprocess.run(
            self.command(*options),
            cwd=self.folder,
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=END_SECONDS,
        )

    def text(self) -> str:
        return self.printed.read_text("utf-8")

    def api(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """Prefect's REST API; a server on SQLite answers 503 while it is busy."""
        url = f"http://{HOST}:{self.prefect}/api{path}"

        def ask() -> httpx.Response | None:
            got = httpx.request(method, url, json=body, timeout=60)
            return None if got.status_code == httpx.codes.SERVICE_UNAVAILABLE else got.raise_for_status()

        answer = wait_until(ask, END_SECONDS)
        return answer.json() if answer.content else None

    def left(self) -> dict[int, int]:
        """Processes of the stack, in whatever session."""
        return marked(self.folder / ".sft")


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """`sft up`, started for the first time in its folder."""
    stack = Up(tmp_path_factory.mktemp("up"))
    (stack.folder / "sleepy.py").write_text(
        "import time\nfrom prefect import flow\n\n\n@flow\ndef sleepy():\n    time.sleep(900)\n"
    )
    try:
        stack.start()
        yield stack
    finally:
        if stack.process is not None and stack.process.poll() is None:
            stack.process.kill()
            stack.process.wait()
        end_marked(stack.folder / ".sft")


def test_it_prints_where_the_uis_are_and_what_to_do_next(up: Up) -> None:
    text = up.text()
    form = up.api("GET", "/deployments/name/retrain/on-demand")["id"]
    for line in (
        f"http://{HOST}:{up.prefect}   runs",
        f"http://{HOST}:{up.mlflow}   models",
        f"http://{HOST}:{up.prefect}/deployments/deployment/{form}/run",
        "prefect deployment run retrain/on-demand",
        "Schedules:\n  none is switched on",
    ):
        assert line in text
    exports = (
        f"export PREFECT_API_URL=http://{HOST}:{up.prefect}/api\nexport MLFLOW_TRACKING_URI=http://{HOST}:{up.mlflow}\n"
    )
    assert up.run("--print-env").stdout == exports


def test_pools_limits_workers_automations_and_deployments_are_there(up: Up) -> None:
    pools = {
        pool["name"]: (pool["type"], pool["concurrency_limit"]) for pool in up.api("POST", "/work_pools/filter", {})
    }
    assert pools == {"cpu": ("process", None), "gpu": ("process", 1)}
    for pool in pools:
        wait_until(lambda pool=pool: up.api("POST", f"/work_pools/{pool}/workers/filter", {}), END_SECONDS)
    deployments = up.api("POST", "/deployments/filter", {})
    assert sorted((d["name"], d["work_pool_name"]) for d in deployments) == [
        ("cpu", "cpu"),
        ("gpu", "gpu"),
        ("gpu", "gpu"),
        ("nightly", "cpu"),
        ("on-approval", "cpu"),
        ("on-demand", "cpu"),
        ("on-demand", "cpu"),
    ]
    assert [s["active"] for d in deployments for s in d["schedules"]] == [False]
    assert len(up.api("POST", "/automations/filter", {})) >= 2


def test_nothing_listens_beyond_this_machine(up: Up) -> None:
    found = socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)
    addresses = {HOST} | {str(entry[4][0]) for entry in found}
    for port in (up.prefect, up.mlflow):
        assert [address for address in addresses if not is_free(port, address)] == [HOST]


def test_a_taken_port_and_a_second_one_in_the_folder_are_refused(up: Up, tmp_path: Path) -> None:
    second = up.run()
    assert (second.returncode, second.stderr.count("\n")) == (1, 1)
    assert f"another sft up runs in {up.folder}" in second.stderr
    elsewhere = Up(tmp_path)
    elsewhere.mlflow = up.mlflow
    taken = elsewhere.run()
    assert taken.returncode == 1
    assert taken.stderr == f"error: port {up.mlflow} of {HOST} is taken; choose another with --mlflow-port PORT\n"
    assert elsewhere.left() == {}


def test_ctrl_c_ends_a_running_flow_and_leaves_nothing(up: Up) -> None:
    """The flow sleeps for longer than the bound on the drain; the second start has what the first one had."""
    nightly = up.api("GET", "/deployments/name/retrain/nightly")
    schedule = nightly["schedules"][0]["id"]
    up.api("PATCH", f"/deployments/{nightly['id']}/schedules/{schedule}", {"active": True})
    flow = up.api("POST", "/flows/", {"name": "sleepy"})["id"]
    sleepy = {"name": "sleepy", "flow_id": flow, "entrypoint": "sleepy.py:sleepy", "work_pool_name": "cpu"}
    pull = [{"prefect.deployments.steps.set_working_directory": {"directory": str(up.folder)}}]
    deployment = up.api("POST", "/deployments/", {**sleepy, "pull_steps": pull})["id"]
    run = up.api("POST", f"/deployments/{deployment}/create_flow_run", {})["id"]
    wait_until(lambda: up.api("GET", f"/flow_runs/{run}")["state_type"] == "RUNNING", END_SECONDS)
    assert len(up.left()) >= 5  # two servers, two workers, the flow

    up.process.send_signal(signal.SIGINT)
    assert up.process.wait(END_SECONDS) == 0, up.text()
    assert "1 run(s) may go on for 5 s" in up.text()
    assert "1 run(s) were told to end" in up.text()
    assert up.left() == {}

    up.start()
    assert "registering" not in up.text()
    assert "Schedules:\n  retrain/nightly  cron 0 3 * * * Etc/UTC  next run 20" in up.text()
    assert up.api("GET", f"/flow_runs/{run}")["state_type"] != "RUNNING"
    again = up.api("GET", "/deployments/name/retrain/nightly")
    assert [s["active"] for s in again["schedules"]] == [True]
    assert again["id"] == nightly["id"]


def test_an_error_of_a_service_of_the_server_is_said_once(up: Up) -> None:
    with (up.folder / ".sft" / "logs" / "prefect.log").open("a") as log:
        log.write(LINES)
    said = "warning: Prefect's server reports an error of its service schedule_recent_deployments: sqlalchemy.exc.Inv"
    wait_until(lambda: said in up.text(), END_SECONDS)
    assert up.text().count(said) == 1


def test_what_a_killed_one_left_is_ended_by_the_next(up: Up) -> None:
    up.process.kill()
    up.process.wait()
    assert up.left()
    up.start()
    assert "that an earlier sft up left here" in up.text()


def test_a_server_that_dies_is_named_and_the_rest_is_stopped(up: Up) -> None:
    server = next(pid for pid in up.left() if b"mlflow" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"))
    os.kill(server, signal.SIGKILL)
    assert up.process.wait(END_SECONDS) == 1, up.text()
    assert "error: mlflow ended with status -9" in up.text()
    assert str(up.folder / ".sft" / "logs" / "mlflow.log") in up.text()
    time.sleep(1)
    assert up.left() == {}


def test_a_server_that_plans_no_run_of_a_schedule_is_an_error(up: Up) -> None:
    """Its scheduler is off, and no run of before is left. A broken one looks the same from outside."""
    database = up.folder / ".sft" / "prefect" / "prefect.db"
    with sqlite3.connect(database) as connection:
        assert connection.execute("select count(*) from deployment_schedule where active").fetchone() == (1,)
        connection.execute("delete from flow_run where auto_scheduled")
    up.settings["PREFECT_SERVER_SERVICES_SCHEDULER_ENABLED"] = "false"
    up.program = ["-c", IMPATIENT]
    refused = up.run()
    assert refused.returncode == 1
    assert "error: no run is planned of retrain/nightly (cron 0 3 * * * Etc/UTC)" in refused.stderr
    assert up.left() == {}
