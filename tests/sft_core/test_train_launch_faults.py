"""Two real ranks under torchrun, and what becomes of them when one is killed, one hangs, or their parent is killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sft_core.errors import TrainError
from sft_core.train.launchers import Launch, free_port
from sft_core.train.ranks import RANKS, Beat
from tests.sft_core.train_runs import config, train

ROOT = Path(__file__).parents[2]
END_TIMEOUT = 240
"""Seconds; processes are gone in one on an idle machine."""
HANG_TIMEOUT = 40
"""`ddp_timeout` of the run with a hung rank; half of it in silence is a fault."""
LONG = {"num_processes": 2, "deepspeed": "zero2", "max_steps": 2000, "num_train_epochs": 2000}
PARENT = """
import sys
from pathlib import Path
from tests.sft_core.test_train_launch_faults import LONG
from tests.sft_core.train_runs import config, train
packed, model, folder = map(Path, sys.argv[1:])
train(packed, model, folder, config(**LONG), lambda line: print(line, flush=True))
"""
SHARE = """
import os, sys
from datetime import timedelta
from pathlib import Path
import torch
from sft_core.errors import TrainError
from sft_core.train.pulse import check_shared
from sft_core.train.ranks import RANKS, Heart
torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=120))
for folder in sys.argv[1:]:
    heart = Heart(Path(folder) / RANKS, os.environ["RANK"], 600)
    try:
        check_shared(heart, torch.device("cpu"), within=15)
        print("shared")
    except TrainError as error:
        print(error)
"""


def pids(folder: Path) -> list[int]:
    """Of the two ranks."""
    beats = [Beat.read(folder / "work" / RANKS / str(rank)) for rank in (0, 1)]
    assert all(beats)
    return [beat.pid for beat in beats if beat is not None]


def await_end(processes: list[int]) -> None:
    """AssertionError naming those that live on."""
    deadline = time.monotonic() + END_TIMEOUT
    while living := [pid for pid in processes if alive(pid)]:
        assert time.monotonic() < deadline, f"processes {living} outlive their parent"
        time.sleep(0.1)


def alive(pid: int) -> bool:
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "limit", "expected"),
    [
        (signal.SIGKILL, 600, r"^rank 1 ended with status -9 \(SIGKILL; if nobody sent it, memory ran out\)"),
        (signal.SIGSTOP, HANG_TIMEOUT, r"^no sign of life for \d+ s from rank 1 \(process \d+ on .*\): stopped, stuck"),
    ],
)
def test_a_rank_that_is_lost_or_hangs_is_named_and_no_rank_remains(
    number: int, limit: float, expected: str, packed: Path, tiny_model: Path, tmp_path: Path
) -> None:
    ranks: list[int] = []

    def strike(line: str) -> None:
        if line.startswith("step 2/"):
            ranks.extend(pids(tmp_path))
            os.kill(ranks[1], number)

    with pytest.raises(TrainError, match=expected) as fault:
        train(packed, tiny_model, tmp_path, config(**LONG), strike, Launch(ddp_timeout=limit))
    assert "Traceback" not in str(fault.value)
    await_end(ranks)


@pytest.mark.slow
def test_no_rank_outlives_a_killed_parent(packed: Path, tiny_model: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(packed), str(tiny_model), str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 2/"):
            break
    children = [*pids(tmp_path), launcher_of(pids(tmp_path)[0])]
    assert all(map(alive, children))
    process.kill()
    process.wait(END_TIMEOUT)
    await_end(children)


def launcher_of(pid: int) -> int:
    """Its parent, torchrun."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.slow
def test_machines_that_do_not_share_the_checkpoints_are_told_so_at_the_start(tmp_path: Path) -> None:
    """Two ranks that first share a folder, then have one each."""
    folders = [["a", "b"], ["a", "c"]]
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", SHARE, *(str(tmp_path / name) for name in names)],
            cwd=ROOT,
            env={**shared, "RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank, names in enumerate(folders)
    ]
    said = [rank.communicate(timeout=END_TIMEOUT)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    for text in said:
        first, second = text.splitlines()
        assert first == "shared"
        assert "files of rank 1 are not seen by rank 0" in second
