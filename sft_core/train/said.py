"""What the ranks and their launcher said, and the one reason that follows from it.

In: raw lines of the child's output. Out: progress lines, passed on at once; after a failure one message. Of several
causes the user's fault comes first, then the first rank that a signal ended, then what torch says, then the last lines.
"""

import json
import re
import signal
from collections import deque
from collections.abc import Callable
from pathlib import Path

from sft_core.train.worker import FAULT, LOST, STOPPED

TAIL_LINES = 30
PROGRESS = ("step ", "resuming ", "note: ")
"""Beginnings of lines that are passed on while training runs."""
NOISE = ("FutureWarning", "UserWarning", "DeprecationWarning", "warnings.warn", "[W", "[INFO]", "[WARNING]", "W1", "W0")
TORCHRUN_FAILED = "failed (exitcode: "
"""From here on torchrun speaks of ranks that failed: where it raised the error itself, and a summary."""
APART = re.compile(r"torch\.distributed\.Dist(?:Store|Network)Error: (.+)")
TIME = re.compile(r"\s*time\s*: (\S+)")
RANK = re.compile(r"\s*rank\s*: (\d+) \(local_rank: \d+\)")
EXITCODE = re.compile(r"\s*exitcode\s*: (-?\d+) \(pid: \d+\)")
ENDED_BY_TORCHRUN = -signal.SIGTERM
"""Ranks that were well are ended so when another one fails."""


class Said:
    """Listens. `stopped`: a rank has said that it saved after SIGTERM."""

    def __init__(self, on_line: Callable[[str], None]) -> None:
        self.fault: str | None = None
        self.lost: str | None = None
        self.apart: str | None = None
        self.stopped = False
        self._on_line = on_line
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._summary = False
        self._time = self._rank = ""
        self._signals: list[tuple[str, str, int]] = []

    def hear(self, raw: bytes) -> None:
        """One line, without its end."""
        line = raw.decode(errors="backslashreplace").rsplit("\r", 1)[-1]
        self._summary = self._summary or TORCHRUN_FAILED in line
        if line.startswith(FAULT):
            self.fault = self.fault or json.loads(line.removeprefix(FAULT))
        elif line.startswith(LOST):
            self.lost = self.lost or json.loads(line.removeprefix(LOST))
        elif line.startswith(STOPPED):
            self.stopped = True
        elif apart := APART.match(line):
            self.apart = self.apart or apart[1].rstrip(".")
        elif self._summary:
            self._hear_summary(line)
        elif line.strip() and not line.lstrip().startswith(NOISE):
            self._tail.append(line)
            if line.startswith(PROGRESS):
                self._on_line(line)

    def reason(self, status: int, behind: str | None, log: Path) -> str:
        """Why the child ended with `status`. `behind`: which rank the others would be waiting for."""
        if self.fault:
            return f"{self.fault}; full log: {log}"
        if self._signals:
            _, rank, number = min(self._signals)
            return f"rank {rank} ended with status {number} ({_signal_name(number)}); full log: {log}"
        if self.lost:
            return f"{self.lost}; {behind}; full log: {log}"
        if self.apart:
            return (
                f"the ranks did not come together: {self.apart}. Does the same command run on every machine, with the "
                f"same ADDR and PORT, and does no firewall stand between? Full log: {log}"
            )
        name = f" ({_signal_name(status)})" if status < 0 else ""
        last = "\n".join(f"  {line}" for line in self._tail)
        return f"the training process ended with status {status}{name}; full log: {log}\n{last}"

    def _hear_summary(self, line: str) -> None:
        when, rank, exitcode = TIME.match(line), RANK.match(line), EXITCODE.match(line)
        if when:
            self._time = when[1]
        elif rank:
            self._rank = rank[1]
        elif exitcode and int(exitcode[1]) < 0 and int(exitcode[1]) != ENDED_BY_TORCHRUN:
            self._signals.append((self._time, self._rank, int(exitcode[1])))


def _signal_name(status: int) -> str:
    try:
        name = signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"
    return f"{name}; if nobody sent it, memory ran out" if name == "SIGKILL" else name
