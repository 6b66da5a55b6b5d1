"""Processes of a stack on this machine: a Prefect server, an MLflow server, Prefect workers.

In: a folder for their data and logs, ports. Out: processes that answer, each in a session of its own, ended by `stop`.
They listen on 127.0.0.1 unless told otherwise. All that they start has their environment: by it `marked` finds every
process of a stack, those in sessions of their own and orphans included.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sft_core.errors import SftError

HOST = "127.0.0.1"
START_SECONDS = 300.0
"""Bound on a server's start; on two idle cores a cold one takes 20 s."""
STOP_SECONDS = 30.0
LOOK_SECONDS = 0.2
MLFLOW_SETTINGS = {
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # seven background processes that nothing here uses
    "PYTHONWARNINGS": "ignore:starlette.middleware.wsgi",  # for MLflow's developers; it stood in the server's log
}
MARK = "SFT_STACK"
"""Variable in the environment of every process of a stack that `sft up` started: the stack's folder."""


class ServerError(SftError):
    """A process of the stack did not start, or ended."""


@dataclass(frozen=True, slots=True)
class Process:
    """A started process, its name and the file that has all it printed."""

    name: str
    popen: "subprocess.Popen[bytes]"
    log: Path

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self.popen.poll() is None

    def stop(self, patience: float = STOP_SECONDS) -> None:
        """SIGTERM; after `patience` seconds SIGKILL to all of its session that is left."""
        if self.running:
            self.popen.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.popen.wait(patience)
        self.kill()

    def kill(self) -> None:
        """SIGKILL to its whole process group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait()


def start(
    name: str, arguments: list[str], folder: Path, environment: Mapping[str, str], where: Path | None = None
) -> Process:
    """Start `python -m ARGUMENTS` in `folder`, or in `where`; what it prints goes to `<folder>/logs/<name>.log`."""
    log = folder / "logs" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        popen = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            cwd=where or folder,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Process(name, popen, log)


def start_prefect(folder: Path, port: int, environment: Mapping[str, str], host: str = HOST) -> Process:
    """A Prefect server; PREFECT_SERVER_DATABASE_CONNECTION_URL says its database, else it is SQLite in PREFECT_HOME."""
    return start("prefect", ["prefect", "server", "start", "--host", host, "--port", str(port)], folder, environment)


def start_mlflow(
    folder: Path,
    port: int,
    environment: Mapping[str, str],
    backend: str | None = None,
    artifacts: str | None = None,
    host: str = HOST,
) -> Process:
    """An MLflow server that proxies artifacts. `backend`: a database URL; `artifacts`: a folder or bucket URL.

    One process: of several, uvicorn kills each that does not answer in 5 s, so on a busy machine none ever starts.
    """
    backend = backend or f"sqlite:///{folder / 'mlflow.db'}"
    artifacts = artifacts or str(folder / "mlartifacts")
    places = ["--backend-store-uri", backend, "--artifacts-destination", artifacts]
    address = ["--host", host, "--port", str(port), "--workers", "1"]
    return start("mlflow", ["mlflow", "server", *places, *address], folder, {**MLFLOW_SETTINGS, **environment})


def start_worker(
    pool: str,
    folder: Path,
    environment: Mapping[str, str],
    limit: int | None = None,
    name: str | None = None,
    queues: Sequence[str] = (),
) -> Process:
    """A Prefect worker of `pool`, of all its work queues or of `queues`; PREFECT_API_URL in its environment names the
    server."""
    name = name or f"worker-{pool}"
    arguments = ["prefect", "worker", "start", "--pool", pool, "--name", name]
    arguments += ["--limit", str(limit)] if limit else []
    for queue in queues:
        arguments += ["--work-queue", queue]
    return start(name, arguments, folder, environment)


def wait_for(process: Process, url: str, seconds: float = START_SECONDS) -> None:
    """Until `url` answers 200. ServerError with the end of its log if it ends before, or does not in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not process.running:
            raise ServerError(
                f"{process.name} ended with status {process.popen.returncode}:\n{last_lines(process.log)}"
            )
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(LOOK_SECONDS)
    raise ServerError(f"{process.name}: {url} did not answer in {seconds:.0f} s:\n{last_lines(process.log)}")


def last_lines(log: Path, count: int = 15) -> str:
    """The end of a log."""
    return "\n".join(log.read_text("utf-8", "replace").splitlines()[-count:])


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def is_free(port: int, host: str = HOST) -> bool:
    """Whether nothing listens on `port`."""
    with socket.socket() as probe:
        return probe.connect_ex((host, port)) != 0


def marked(folder: Path) -> dict[int, int]:
    """Processes whose environment has MARK with `folder`: id to parent's id. Needs /proc; empty where there is none."""
    wanted = f"{MARK}={folder}".encode()
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # gone by now, or another user's
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                after_name = (entry / "stat").read_text("utf-8", "replace").rpartition(")")[2].split()
                if after_name[0] != "Z":
                    found[int(entry.name)] = int(after_name[1])
    return found


def end_marked(folder: Path, patience: float = 5.0) -> int:
    """SIGTERM to all of a stack's processes that are left, SIGKILL after `patience` seconds; how many there were."""
    first = marked(folder)
    for pid in first:
        send(pid, signal.SIGTERM)
    deadline = time.monotonic() + patience
    while (left := marked(folder)) and time.monotonic() < deadline:
        time.sleep(LOOK_SECONDS)
    while left:
        for pid in left:
            send(pid, signal.SIGKILL)
        time.sleep(LOOK_SECONDS)
        left = marked(folder)
    return len(first)


def send(pid: int, number: signal.Signals) -> None:
    """A signal to a process that may have ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
