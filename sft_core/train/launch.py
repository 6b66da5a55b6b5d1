"""Start this machine's training ranks as a child process, relay its lines, and never leave one behind.

In: the spec's file, the number of ranks on all machines, the `Launch` in force. Out: nothing, or TrainError with one
reason. The child has its own session. Whatever ends `run_training` (an exception, a cancelled flow, Ctrl-C) asks the
child to save (SIGTERM), then kills it; a SIGTERM to this process is passed on. A rank that gives no sign of life ends
the run, and so does what `check` raises, which is called every second; ranks end themselves where this process gives no
sign of life.
"""

import contextlib
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from sft_core import stop
from sft_core.children import die_with_parent
from sft_core.errors import TrainError
from sft_core.train.launcher import launcher_name
from sft_core.train.launchers import ONE_MACHINE, Launch, training_command, training_environment
from sft_core.train.ranks import RANKS, Heart, RankWatch
from sft_core.train.said import Said
from sft_core.train.spec import TrainSpec
from sft_core.train.worker import EXIT_STOPPED

__all__ = ["TrainingStopped", "run_training", "training_command", "training_environment"]

GRACE_SECONDS = 20.0
"""Time the child gets to save after SIGTERM; Prefect kills a cancelled flow after 30 s."""
WATCH_SECONDS = 1.0
"""Between two looks at the ranks' signs of life."""


class TrainingStopped(TrainError):
    """SIGTERM ended the training; its finished optimizer steps are saved, and the same command goes on from there."""


class _Silent(TrainError):
    """A rank gives no sign of life: there is nothing to wait for."""


def run_training(
    spec: Path,
    num_processes: int,
    log: Path,
    on_line: Callable[[str], None],
    launch: Launch = ONE_MACHINE,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Run the ranks to their end. TrainError with the reason if they fail, TrainingStopped if they saved on SIGTERM."""
    command = training_command(spec, num_processes, launch)
    local = launch.local_ranks(num_processes)
    watch = RankWatch(spec.parent / RANKS, num_processes, local, launch.ddp_timeout, time.monotonic())
    heart = Heart(spec.parent / RANKS, launcher_name(launch.node_rank), TrainSpec.read(spec).silence_seconds)
    process = subprocess.Popen(
        command,
        env=training_environment(os.environ, num_processes, launch),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=partial(die_with_parent, os.getpid()),
    )
    said = Said(on_line)
    try:
        with stop.handed_over(signal.SIGTERM, process.terminate) as asked:
            _relay(process, log, said, watch, check)
            status = process.wait()
    except BaseException as reason:  # also a cancelled flow's signal and Ctrl-C: the child must never be left behind
        _stop(process, 0.0 if isinstance(reason, _Silent) else GRACE_SECONDS, log)
        raise
    finally:
        heart.end()
        if process.stdout:
            process.stdout.close()
    if status == EXIT_STOPPED or (status != 0 and said.stopped and not said.fault):
        raise TrainingStopped(
            "training was stopped by SIGTERM; its finished optimizer steps are saved, and the same command goes on "
            "from there"
        )
    if status != 0 and asked and not said.fault:
        raise TrainError(
            "training was stopped by SIGTERM before it could save; the same command goes on from the newest "
            f"checkpoint, if there is one; full log: {log}"
        )
    if status != 0:
        raise TrainError(said.reason(status, watch.behind() if num_processes > 1 else None, log))


def _relay(
    process: subprocess.Popen[bytes], log: Path, said: Said, watch: RankWatch, check: Callable[[], None]
) -> None:
    """Read the child's lines until all of it has ended, or until a rank is silent."""
    assert process.stdout is not None
    pipe, rest, look = process.stdout.fileno(), b"", 0.0
    with log.open("ab", buffering=0) as file, selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while True:
            ended = process.poll() is not None
            if selector.select(0 if ended else WATCH_SECONDS):
                chunk = os.read(pipe, 1 << 16)
                *lines, rest = (rest + chunk).split(b"\n") if chunk else (rest, b"")
                for line in lines:
                    with contextlib.suppress(
                        OSError
                    ):  # a full disk: the child will say so, and it is the child's to say
                        file.write(line.rsplit(b"\r", 1)[-1] + b"\n")
                    said.hear(line)
                if not chunk:
                    return
            elif ended:  # whoever still holds the pipe is not waited for
                return
            if not ended and time.monotonic() > look:
                check()
                fault, look = watch.fault(time.monotonic()), time.monotonic() + WATCH_SECONDS
                if fault is not None:
                    raise _Silent(f"{fault}. All ranks were ended; the same command goes on from the newest checkpoint")


def _stop(process: subprocess.Popen[bytes], grace: float, log: Path) -> None:
    """SIGTERM to the launcher, which passes it on to the ranks; SIGKILL when time is up. Ranks die with it. Their last
    words go to the log: a pipe that nobody reads could hold up the saving."""
    if process.poll() is None:
        if grace:
            process.terminate()
        try:
            words, _ = process.communicate(timeout=grace)
            with contextlib.suppress(OSError), log.open("ab") as file:
                file.write(words)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
