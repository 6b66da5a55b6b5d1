"""A real Prefect server, a real MLflow server and workers, on free ports of loopback, in one folder."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from cli.servers import HOST, Process, free_port, last_lines, start_mlflow, start_prefect, start_worker, wait_for

ROOT = Path(__file__).parents[2]
COMMAND_SECONDS = 300.0
"""Bound on one `prefect` or `sft` command."""
RUN_SECONDS = 600.0
"""Bound on one flow run; about 60 s on two idle cores."""
LOCKED_TRIES = 30
STORY_LINES = 25
Value = TypeVar("Value")

RECIPE = """
name: orders
store: ./store
base_model: {path: base}
datasets: [{path: rows.jsonl, map_fn: alpaca}]
eval_fraction: 0.2
pack: {max_length: 64, chat_template: chatml}
train:
  dtype: float32
  lora: {r: 4, lora_alpha: 8, lora_dropout: 0.0}
  max_steps: 3
  per_device_train_batch_size: 2
  gradient_accumulation_steps: 1
  learning_rate: 1.0e-2
  gradient_checkpointing: false
  logging_steps: 1
evaluate: {max_new_tokens: 4, max_generated_rows: 2}
"""


class Stack:
    """Servers and workers that were started here, and how to talk to them. `stop` ends all of them."""

    def __init__(self, folder: Path, **settings: str) -> None:
        """`settings`: environment of every process besides what is set here."""
        self.folder = folder
        self.prefect_port, self.mlflow_port = free_port(), free_port()
        self.prefect_url = f"http://{HOST}:{self.prefect_port}"
        self.mlflow_url = f"http://{HOST}:{self.mlflow_port}"
        self.processes: dict[str, Process] = {}
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_"))}
        self.environment = {
            **inherited,
            "PREFECT_HOME": str(folder / "prefect"),
            "PREFECT_API_URL": f"{self.prefect_url}/api",
            "PREFECT_UI_URL": self.prefect_url,
            "PREFECT_WORKER_QUERY_SECONDS": "2",
            "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
            "PREFECT_WORKER_PREFETCH_SECONDS": "1",
            "MLFLOW_TRACKING_URI": self.mlflow_url,
            "SFT_PROJECT_DIR": str(folder),
            "PYTHONPATH": str(ROOT),
            "DO_NOT_TRACK": "true",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "150",
            **settings,
        }

    def start(self, backend: str | None = None, artifacts: str | None = None) -> "Stack":
        """Both servers; returns when both answer."""
        self.processes["mlflow"] = start_mlflow(self.folder, self.mlflow_port, self.environment, backend, artifacts)
        self.start_prefect()
        wait_for(self.processes["mlflow"], f"{self.mlflow_url}/health")
        return self

    def start_prefect(self) -> None:
        """Prefect's server alone, for the first time or again with its port and database; returns when it answers."""
        self.processes["prefect"] = start_prefect(self.folder, self.prefect_port, self.environment)
        wait_for(self.processes["prefect"], f"{self.prefect_url}/api/health")

    def make_pool(self, name: str) -> None:
        """A work pool for processes, as `sft up` makes it; one that is there stays as it is."""
        from prefect.workers.process import ProcessWorker

        if name not in {known["name"] for known in self.api("POST", "/work_pools/filter", {})}:
            template = ProcessWorker.get_default_base_job_template()
            self.api("POST", "/work_pools/", {"name": name, "type": "process", "base_job_template": template})

    def worker(self, pool: str, limit: int | None = None, queue: str | None = None, **settings: str) -> Process:
        """A worker of `pool`, of one of its queues or of all. The pool is made if it is not there."""
        self.make_pool(pool)
        environment = {**self.environment, **settings}
        name = f"{pool}-{len(self.processes)}"
        process = start_worker(pool, self.folder, environment, limit, name, [queue] if queue else [])
        self.processes[process.name] = process
        return process

    def deploy(self) -> None:
        """The project's deployments; pools must be there. Each worker is to read its own SFT_PROJECT_DIR, later."""
        deploy = ["env", "-u", "SFT_PROJECT_DIR", sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
        self.run([*deploy, "--prefect-file", str(ROOT / "prefect.yaml")], ROOT)

    def prefect(self, *arguments: str) -> str:
        """Run `prefect ARGUMENTS` in the project's root; what it printed."""
        return self.command("prefect", *arguments, folder=ROOT)

    def sft(self, *arguments: str, **settings: str) -> str:
        """Run `sft ARGUMENTS` in the stack's folder; what it printed."""
        return self.command("cli.main", *arguments, folder=self.folder, **settings)

    def command(self, *arguments: str, folder: Path, **settings: str) -> str:
        """Run `python -m ARGUMENTS`; what it printed. AssertionError with it where the status is not 0."""
        seconds = RUN_SECONDS if arguments[0] == "cli.main" else COMMAND_SECONDS
        return self.run([sys.executable, "-m", *arguments], folder, seconds, **settings)

    def run(self, command: list[str], folder: Path, seconds: float = COMMAND_SECONDS, **settings: str) -> str:
        """Run a command in `folder`; what it printed. AssertionError with it where the status is not 0."""
        done = subprocess.run(
            command,
            cwd=folder,
            env={**self.environment, **settings},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
        )
        assert done.returncode == 0, f"{command}: status {done.returncode}\n{done.stdout[-4000:]}"
        return done.stdout

    def api(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """Prefect's REST API: `path` below /api. The answer's JSON, None if empty; httpx.HTTPStatusError.

        503 is Prefect's word for SQLite's "database is locked": asked again.
        """
        import httpx

        for _ in range(LOCKED_TRIES):
            answer = httpx.request(method, f"{self.prefect_url}/api{path}", json=body, timeout=60)
            if answer.status_code != 503:
                break
            time.sleep(1)
        answer.raise_for_status()
        return answer.json() if answer.content else None

    def run_deployment(self, name: str, parameters: Mapping[str, Any], at: datetime | None = None) -> str:
        """Start `flow/deployment`, now or `at` that time; the flow run's id."""
        flow, _, deployment = name.partition("/")
        found = self.api("GET", f"/deployments/name/{flow}/{deployment}")
        body: dict[str, Any] = {"parameters": parameters}
        if at is not None:
            body["state"] = {"type": "SCHEDULED", "state_details": {"scheduled_time": at.isoformat()}}
        return str(self.api("POST", f"/deployments/{found['id']}/create_flow_run", body)["id"])

    def flow_run(self, run_id: str) -> dict[str, Any]:
        """One flow run as the API gives it."""
        return dict(self.api("GET", f"/flow_runs/{run_id}"))

    def children(self, run_id: str) -> list[dict[str, Any]]:
        """Flow runs that this one started."""
        return list(self.api("POST", "/flow_runs/filter", {"flow_runs": {"parent_flow_run_id": {"any_": [run_id]}}}))

    def wait_final(self, run_id: str, seconds: float = RUN_SECONDS) -> dict[str, Any]:
        """The flow run once its state is final."""
        final = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
        return wait_until(lambda: run if (run := self.flow_run(run_id))["state_type"] in final else None, seconds)

    def logs(self, run_id: str) -> list[str]:
        """Messages that a flow run logged, in order."""
        wanted = {"logs": {"flow_run_id": {"any_": [run_id]}}, "sort": "TIMESTAMP_ASC", "limit": 200}
        return [entry["message"] for entry in self.api("POST", "/logs/filter", wanted)]

    def story(self) -> str:
        """All flow runs with their states, the last log lines of those that did not complete, and of the processes."""
        import httpx

        try:
            runs = self.api("POST", "/flow_runs/filter", {"sort": "START_TIME_ASC", "limit": 50})
        except httpx.HTTPError as error:  # shown beside another failure
            return f"no answer from Prefect's server: {error}"
        lines = []
        for run in runs:
            about = (run["state_name"], run["run_count"], run["start_time"], (run["state"] or {}).get("message"))
            lines.append(f"{run['name']} {run['id']}: {about}")
            if run["state_type"] not in ("COMPLETED", "SCHEDULED"):
                lines += [f"    {message[:300]}" for message in self.logs(run["id"])[-STORY_LINES:]]
        for process in self.processes.values():
            lines += [f"{process.name}: status {process.popen.poll()}", last_lines(process.log, STORY_LINES)]
        return "\n".join(lines)

    def stop(self) -> None:
        """End every process, workers first."""
        for process in reversed(list(self.processes.values())):
            process.stop()
        self.processes.clear()


def wait_until(look: Callable[[], Value | None], seconds: float, every: float = 0.5) -> Value:
    """What `look` gives once it gives something. AssertionError when time is up."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = look()
        if found:
            return found
        time.sleep(every)
    raise AssertionError(f"not within {seconds:.0f} s")


def write_project(folder: Path, tiny_model: Path, rows: int = 60, recipe: str = RECIPE) -> Path:
    """A user's folder: `base`, `rows.jsonl`, `recipe.yaml`."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(tiny_model, folder / "base")
    write_rows(folder / "rows.jsonl", rows)
    (folder / "recipe.yaml").write_text(recipe)
    return folder


def write_rows(file: Path, count: int) -> None:
    """`count` alpaca rows: asked to say a word, the answer is the word."""
    rows = [{"instruction": f"say w{i}", "input": "", "output": f"w{i}!"} for i in range(count)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
