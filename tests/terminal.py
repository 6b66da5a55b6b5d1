"""A person at a terminal: a command in a pseudo-terminal of its own, keys, what is shown, how it ended."""

import contextlib
import os
import pty
import re
import select
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from cli.servers import MARK, marked

ROOT = Path(__file__).parents[1]
CTRL_C, CTRL_D = b"\x03", b"\x04"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
"""Whoever runs the tests may have them ignored; a shell at a terminal has not."""
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
WAIT_SECONDS = 400.0
"""Bound on waiting for a text; a cold `sft run` on a busy machine takes minutes."""


class Terminal:
    """`python -m cli.main ARGUMENTS` as the leader of a session, its terminal on the other side of `self.master`.
    Everything that it starts is marked with `folder`."""

    def __init__(self, folder: Path, *arguments: str, **settings: str) -> None:
        self.folder = folder
        self._bytes = b""
        self._status: int | None = None
        command = [sys.executable, "-m", "cli.main", *arguments]
        environment = user_environment(folder, **settings)
        self.pid, self.master = pty.fork()
        if self.pid == 0:
            for number in SIGNALS:
                signal.signal(number, signal.SIG_DFL)
            os.chdir(folder)
            os.execve(command[0], command, environment)

    @property
    def shown(self) -> str:
        """All that was printed so far, without colours."""
        return COLOUR.sub("", self._bytes.decode("utf-8", "replace").replace("\r\n", "\n"))

    def wait_for(self, pattern: str, seconds: float = WAIT_SECONDS) -> None:
        """Until what is shown has `pattern`. AssertionError with what is shown instead."""
        self._read_until(lambda: re.search(pattern, self.shown) is not None, seconds)
        assert re.search(pattern, self.shown), f"no {pattern!r} in {seconds:.0f} s:\n{self.shown[-3000:]}"

    def read(self) -> int:
        """Length of what is shown by now."""
        self._read_until(lambda: True, 1.0)
        return len(self.shown)

    def press(self, key: bytes) -> None:
        """A key, or a line."""
        os.write(self.master, key)

    def send(self, number: signal.Signals) -> None:
        """A signal to the command alone."""
        os.kill(self.pid, number)

    def hang_up(self) -> None:
        """Close the terminal."""
        os.close(self.master)
        self.master = -1

    def wait_end(self, seconds: float) -> int:
        """Exit status, -N where signal N ended it. AssertionError if it takes longer."""
        began = time.monotonic()
        self._read_until(lambda: False, seconds)  # to the last line
        assert self._status is not None, f"still there after {seconds:.0f} s:\n{self.shown[-3000:]}"
        self.took = time.monotonic() - began
        return self._status

    def left(self) -> dict[int, int]:
        """Processes that the command started, in whatever session, and that are still there."""
        return marked(self.folder)

    def close(self) -> None:
        """End all of it."""
        for pid in self.left():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._ended(wait=True)
        if self.master >= 0:
            os.close(self.master)

    def _ended(self, wait: bool = False) -> bool:
        if self._status is None:
            pid, status = os.waitpid(self.pid, 0 if wait else os.WNOHANG)
            if pid:
                self._status = os.waitstatus_to_exitcode(status)
        return self._status is not None

    def _read_until(self, enough: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            more = self.master >= 0 and bool(select.select([self.master], [], [], 0.05)[0])
            if more:
                try:
                    self._bytes += os.read(self.master, 1 << 16)
                except OSError:  # nobody has the other side open any more
                    more = False
            if enough() or (self._ended() and not more):
                return
            time.sleep(0 if more else 0.02)


def user_environment(folder: Path, **settings: str) -> Mapping[str, str]:
    """A user's environment: nothing of a server, all processes marked."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_"))}
    own = {
        "PREFECT_HOME": str(folder / "prefect"),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "200",
        MARK: str(folder),
    }
    return {**inherited, **own, **settings}
