"""Start the training ranks as a child process, relay its lines, and never leave one behind.

One rank: `python -m sft_core.train.worker SPEC`. Several: `torchrun` on this machine. The child has its own session.
Whatever ends `run_training` (an exception, a cancelled flow, Ctrl-C) asks the child to save (SIGTERM), then kills it.
"""

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path

from sft_core.errors import TrainError
from sft_core.train.worker import EXIT_STOPPED, FAULT, PR_SET_PDEATHSIG

GRACE_SECONDS = 20.0
"""Time the child gets to save after SIGTERM; Prefect kills a cancelled flow after 30 s."""
TAIL_LINES = 30
PROGRESS = ("step ", "resuming ", "note: ")
"""Beginnings of lines that are passed on while training runs."""
NOISE = ("FutureWarning", "UserWarning", "DeprecationWarning", "warnings.warn", "[W", "[INFO]", "[WARNING]", "W1", "W0")


def training_command(spec: Path, num_processes: int) -> list[str]:
    """The command line of the training ranks on this machine."""
    worker = ["-m", "sft_core.train.worker", str(spec)]
    if num_processes == 1:
        return [sys.executable, *worker]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}", "--max_restarts=0"]
    return [sys.executable, *torchrun, *worker]


def training_environment(environment: Mapping[str, str], num_processes: int) -> dict[str, str]:
    """The child's environment: unbuffered, offline telemetry, and for one rank what torchrun would have set."""
    child = {**environment, "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}
    child.setdefault("OMP_NUM_THREADS", str(max(1, ((os.cpu_count() or 1) - 1) // num_processes)))  # one core for us
    root = str(Path(__file__).parents[2])
    child["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [child.get("PYTHONPATH")])])
    if num_processes == 1:
        single = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        child.update(single, MASTER_PORT=str(_free_port()))
    return child


def run_training(spec: Path, num_processes: int, log: Path, on_line: Callable[[str], None]) -> None:
    """Run the ranks to their end. TrainError with the last lines if they fail, or if they were stopped and saved."""
    process = subprocess.Popen(
        training_command(spec, num_processes),
        env=training_environment(os.environ, num_processes),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="backslashreplace",
        start_new_session=True,
        preexec_fn=_terminate_with_parent,
    )
    try:
        tail = _relay(process, log, on_line)
        status = process.wait()
    except BaseException:  # also a cancelled flow's signal and Ctrl-C: the child must never be left behind
        _stop(process)
        raise
    finally:
        if process.stdout:
            process.stdout.close()
    if status == EXIT_STOPPED:
        raise TrainError("training was stopped by SIGTERM after saving a checkpoint; the same command goes on from it")
    if status != 0:
        if tail and tail[0].startswith(FAULT):
            fault: str = json.loads(tail[0].removeprefix(FAULT))
            raise TrainError(f"{fault.removeprefix('TrainError: ')}; full log: {log}")
        last = "\n".join(f"  {line}" for line in tail)
        raise TrainError(f"the training process ended with status {status}; full log: {log}\n{last}")


def _relay(process: subprocess.Popen[str], log: Path, on_line: Callable[[str], None]) -> deque[str]:
    """The last lines, or the first one that names a user's fault."""
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    fault: str | None = None
    assert process.stdout is not None
    with log.open("ab", buffering=0) as file:
        for raw in process.stdout:
            line = raw.rstrip("\n").rsplit("\r", 1)[-1]
            with contextlib.suppress(OSError):  # a full disk: the child will say so, and it is the child's to say
                file.write(f"{line}\n".encode(errors="backslashreplace"))
            if line.startswith(FAULT) and fault is None:
                fault = line
            elif line.strip() and not line.lstrip().startswith(NOISE):
                tail.append(line)
                if line.startswith(PROGRESS):
                    on_line(line)
    return deque([fault]) if fault is not None else tail


def _stop(process: subprocess.Popen[str]) -> None:
    """SIGTERM to the launcher, which passes it on to the ranks; SIGKILL to the whole group when time is up."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _terminate_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
