"""Processes of a stack on this machine: a Prefect server, an MLflow server, Prefect workers.

In: a folder for their data and logs, ports. Out: processes that answer, each in a session of its own, ended by `stop`.
All listen on 127.0.0.1 only.
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
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sft_core.errors import SftError

HOST = "127.0.0.1"
START_SECONDS = 300.0
"""Bound on a server's start; on two idle cores a cold one takes 20 s."""
STOP_SECONDS = 30.0
LOOK_SECONDS = 0.2


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


def start(name: str, arguments: list[str], folder: Path, environment: Mapping[str, str]) -> Process:
    """Start `python -m ARGUMENTS` in `folder`; what it prints goes to `<folder>/logs/<name>.log`."""
    log = folder / "logs" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        popen = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            cwd=folder,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Process(name, popen, log)


def start_prefect(folder: Path, port: int, environment: Mapping[str, str]) -> Process:
    """A Prefect server; PREFECT_SERVER_DATABASE_CONNECTION_URL says its database, else it is SQLite in PREFECT_HOME."""
    return start("prefect", ["prefect", "server", "start", "--host", HOST, "--port", str(port)], folder, environment)


def start_mlflow(
    folder: Path, port: int, environment: Mapping[str, str], backend: str | None = None, artifacts: str | None = None
) -> Process:
    """An MLflow server that proxies artifacts. `backend`: a database URL; `artifacts`: a folder or bucket URL."""
    backend = backend or f"sqlite:///{folder / 'mlflow.db'}"
    artifacts = artifacts or str(folder / "mlartifacts")
    places = ["--backend-store-uri", backend, "--artifacts-destination", artifacts]
    address = ["--host", HOST, "--port", str(port), "--workers", "2"]
    return start("mlflow", ["mlflow", "server", *places, *address], folder, environment)


def start_worker(
    pool: str, folder: Path, environment: Mapping[str, str], limit: int | None = None, name: str | None = None
) -> Process:
    """A Prefect worker of `pool`; PREFECT_API_URL in its environment says of which server."""
    name = name or f"worker-{pool}"
    arguments = ["prefect", "worker", "start", "--pool", pool, "--name", name]
    return start(name, arguments + (["--limit", str(limit)] if limit else []), folder, environment)


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


def is_free(port: int) -> bool:
    """Whether nothing listens on `port`."""
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) != 0
