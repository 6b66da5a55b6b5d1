"""Commands of `sft`, one after another in one process that has what they import: real, but for their start.

Each has arguments, a current folder, an environment, standard input and output of its own, and goes through
`cli.main.main` to its exit status. A process of their own have those commands whose start, end or environment at import
is what is tested (`python -m cli.main`).
"""

import contextlib
import io
import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import pytest

from sft_core.children import die_with_parent

ROOT = Path(__file__).parents[1]
COMMAND_SECONDS = 800
"""Bound on one command; `sft run` takes about 20 s on two idle cores."""
END_SECONDS = 60


class Commands:
    """The process; started by the first command. `settings`: of its environment while it imports."""

    def __init__(self, folder: Path, **settings: str) -> None:
        patience = {"PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "300"}
        own = {"PREFECT_HOME": str(folder / "prefect"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self._settings = {**own, **patience, "HF_HUB_OFFLINE": "1", "COLUMNS": "150", **settings}
        self._folder = folder
        self._process: subprocess.Popen[str] | None = None

    def run(
        self, folder: Path, *arguments: str, given: str = "", **settings: str
    ) -> "subprocess.CompletedProcess[str]":
        """`sft ARGUMENTS` in `folder`; `given`: its standard input, `settings`: of its environment."""
        process = self._started()
        environment = self._environment(settings)
        with tempfile.TemporaryDirectory(dir=self._folder) as scratch:
            streams = [Path(scratch) / name for name in ("in", "out", "err")]
            streams[0].write_text(given)
            asked = [list(map(str, arguments)), str(folder), environment, *map(str, streams)]
            assert process.stdin is not None
            process.stdin.write(json.dumps(asked) + "\n")
            process.stdin.flush()
            status = self._status(process, arguments)
            out, err = (path.read_text("utf-8") for path in streams[1:])
        return subprocess.CompletedProcess(list(arguments), status, out, err)

    def end(self) -> None:
        """End the process, and the Prefect server that its runs had."""
        if self._process is None:
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.communicate(timeout=END_SECONDS)
        self._process.kill()
        self._process.wait()
        self._process = None

    def _environment(self, settings: Mapping[str, str]) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
        return {**inherited, **self._settings, **settings}

    def _started(self) -> "subprocess.Popen[str]":
        if self._process is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            command = [sys.executable, "-m", "tests.commands", str(os.getpid())]
            self._process = subprocess.Popen(command, env=self._environment({}), cwd=ROOT, **pipes)
        return self._process

    def _status(self, process: "subprocess.Popen[str]", arguments: tuple[str, ...]) -> int:
        assert process.stdout is not None
        if not select.select([process.stdout], [], [], COMMAND_SECONDS)[0]:
            process.kill()
            raise AssertionError(f"sft {arguments} took more than {COMMAND_SECONDS} s")
        line = process.stdout.readline()
        assert line, f"sft {arguments} ended the process"
        return int(line)


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    """One process for all tests of this one."""
    made = Commands(tmp_path_factory.mktemp("commands"))
    yield made
    made.end()


def _serve(parent: int) -> None:
    die_with_parent(parent)
    asked, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    for line in asked:
        answers.write(f"{_run(*json.loads(line))}\n")
        answers.flush()


def _run(arguments: list[str], folder: str, environment: Mapping[str, str], *streams: str) -> int:
    """Exit status of one command, all that it says in files."""
    for number, path in enumerate(streams):
        descriptor = os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdin, sys.stdout, sys.stderr = _stream(0, "r"), _stream(1, "w"), _stream(2, "w")
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = ["sft", *arguments]
    try:
        status = _main()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        _forget()
    return status


def _stream(number: int, mode: str) -> IO[str]:
    binary = os.fdopen(number, f"{mode}b", closefd=False)
    return io.TextIOWrapper(binary, encoding="utf-8", line_buffering=True)


def _main() -> int:
    import traceback

    from cli.main import main

    try:
        main()
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:  # noqa: BLE001 - as Python ends a process
        traceback.print_exc()
        return 1
    return 0


def _forget() -> None:
    """What one command leaves in libraries, and another of a process of its own would not find."""
    from sft_core import stop

    stop.leave()
    if "mlflow" in sys.modules:
        sys.modules["mlflow"].set_tracking_uri(None)
    if "tasks.tracking" in sys.modules:
        sys.modules["tasks.tracking"].client.cache_clear()
    os.chdir("/")


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
