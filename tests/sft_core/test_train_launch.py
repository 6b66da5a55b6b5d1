"""Commands and environments of each launcher, Slurm's host lists, and when a rank counts as silent."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from cli.launch import read_launch, with_ranks
from sft_core.errors import RecipeError, TrainError
from sft_core.recipe import Recipe
from sft_core.train.launchers import (
    Launch,
    first_of,
    interface_towards,
    slurm_launch,
    tasks_per_node,
    training_command,
    training_environment,
)
from sft_core.train.nodes import train_along
from sft_core.train.ranks import ENDED, RECORD_BYTES, SAVING, TRAINING, Beat, Heart, RankWatch
from sft_core.train.said import Said

XTUNER = {"NNODES": "2", "NODE_RANK": "1", "NPROC_PER_NODE": "4", "ADDR": "10.0.0.1", "PORT": "29777"}
SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "6",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_JOB_NODELIST": "node[07-09]",
    "SLURM_TASKS_PER_NODE": "2(x3)",
    "SLURM_JOB_ID": "40123",
}
RECIPE = Recipe.model_validate(
    {"name": "r", "base_model": {"path": "m"}, "datasets": [{"path": "p", "map_fn": "alpaca"}]}
)
LOG = Path("train.log")


def test_xtuners_environment_becomes_torchruns_command() -> None:
    launch = read_launch(XTUNER, "pytorch", 600)
    assert with_ranks(XTUNER, launch, {"seed": 3}, RECIPE) == {"seed": 3, "train": {"num_processes": 8}}
    assert launch.local_ranks(8) == range(4, 8)
    command = training_command(Path("spec.json"), 8, launch)
    for option in (
        "--nproc_per_node=4",
        "--nnodes=2",
        "--node_rank=1",
        "--master_addr=10.0.0.1",
        "--master_port=29777",
    ):
        assert option in command
    assert command[-2:] == ["spec.json", "600"]


def test_without_an_environment_the_recipe_decides() -> None:
    launch = read_launch({}, None, 600)
    assert with_ranks({}, launch, {}, RECIPE) == {}
    assert with_ranks({"NPROC_PER_NODE": "3"}, launch, {}, RECIPE) == {"train": {"num_processes": 3}}
    assert with_ranks({}, read_launch({}, "none", 600), {}, RECIPE) == {"train": {"num_processes": 1}}
    assert "torch.distributed.run" in training_command(LOG, 1, read_launch({}, "torchrun", 600))


@pytest.mark.parametrize(
    ("changes", "launcher", "expected"),
    [
        ({"NODE_RANK": "2"}, None, "NODE_RANK=2, NNODES=2"),
        ({"ADDR": ""}, None, "ADDR and PORT are needed"),
        ({"NNODES": "two"}, None, "NNODES=two: a whole number"),
        ({"NPROC_PER_NODE": ""}, None, "set NPROC_PER_NODE too"),
        ({}, "none", "which starts one rank"),
        ({}, "mpi", "one of torchrun, slurm, none"),
        ({}, "slurm", "SLURM_PROCID' of srun's environment is missing"),
    ],
)
def test_a_wrong_environment_is_one_error(changes: dict[str, str], launcher: str | None, expected: str) -> None:
    environment = {name: value for name, value in {**XTUNER, **changes}.items() if value}
    with pytest.raises(RecipeError, match=expected):
        with_ranks(environment, read_launch(environment, launcher, 600), {}, RECIPE)


def test_a_task_of_srun_is_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")  # no scontrol
    launch = slurm_launch(SLURM)
    child = training_environment({}, 6, launch)
    expected = {"RANK": "5", "WORLD_SIZE": "6", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "node07"}
    assert {name: child[name] for name in expected} == expected
    assert child["MASTER_PORT"] == "20123"
    assert "torch.distributed.run" not in training_command(LOG, 6, launch)


def test_nothing_in_the_current_folder_hides_what_ranks_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's `datasets.py`: `-m` puts the folder first, and in a flow run PYTHONPATH names it too."""
    monkeypatch.chdir(tmp_path)
    places = os.pathsep.join([str(tmp_path), str(tmp_path / "else"), ""])
    child = training_environment({**os.environ, "PYTHONPATH": places}, 1)
    shown = subprocess.run([sys.executable, "-m", "site"], env=child, capture_output=True, text=True, timeout=60).stdout
    path = [line.strip().strip("',") for line in shown.partition("[")[2].partition("]")[0].splitlines() if line.strip()]
    assert path[:2] == [str(Path(__file__).parents[2]), str(tmp_path / "else")]
    assert str(tmp_path) not in path


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("vm", "vm"),
        ("a1,a2", "a1"),
        ("node[01-03,7],other", "node01"),
        ("r[2,4]n[10-12]-ib", "r2n10-ib"),
        ("gpu[007]", "gpu007"),
    ],
)
def test_the_first_host_of_a_list(nodes: str, first: str) -> None:
    assert first_of(nodes) == first


def test_tasks_per_node_in_slurms_short_form() -> None:
    assert tasks_per_node("2(x3),1,4(x1)") == [2, 2, 2, 1, 4]
    with pytest.raises(ValueError, match="TASKS_PER_NODE"):
        tasks_per_node("2(x3")


def test_the_interface_of_an_address_is_found() -> None:
    assert interface_towards("127.0.0.1") == "lo"
    assert interface_towards("no.such.host.invalid") is None


def write(folder: Path, rank: int, **beat: object) -> None:
    folder.mkdir(exist_ok=True)
    (folder / str(rank)).write_bytes(Beat(**{"pid": 9, "host": "h", "state": TRAINING, **beat}).as_bytes())  # type: ignore[arg-type]


def test_a_silent_rank_is_named_and_others_beat_on(tmp_path: Path) -> None:
    watch = RankWatch(tmp_path, 2, range(2), limit=100, now=0)
    for now in range(0, 60, 5):
        write(tmp_path, 0, count=now, moves=3)
        if now < 10:
            write(tmp_path, 1, count=now, moves=2)
        fault = watch.fault(now)
    assert fault is None  # 50 s
    write(tmp_path, 0, count=60, moves=3)
    found = watch.fault(60)
    assert found == (
        "no sign of life for 55 s from rank 1 (process 9 on h, after 2 micro-batches): stopped, stuck on a disk, or "
        "the machine is gone"
    )
    write(tmp_path, 1, count=61, moves=2, state=ENDED)
    assert watch.fault(61) is None
    assert watch.behind() == "furthest behind: rank 1 (process 9 on h, after 2 micro-batches)"


def test_ranks_that_beat_but_do_not_move_are_a_fault_unless_they_save(tmp_path: Path) -> None:
    watch = RankWatch(tmp_path, 1, range(1), limit=100, now=0)
    for state, expected in ((SAVING, False), (TRAINING, True)):
        for now in range(0, 160, 10):
            write(tmp_path, 0, count=now, moves=1, state=state)
            fault = watch.fault(now)
        assert (fault is not None) == expected
    assert "no rank has moved on for 100 s; furthest behind: rank 0" in str(fault)


def test_what_an_earlier_start_left_is_not_taken_for_life_or_silence(tmp_path: Path) -> None:
    write(tmp_path, 0, count=5)
    write(tmp_path, 1, count=5)
    watch = RankWatch(tmp_path, 2, range(1), limit=100, now=0)
    assert not (tmp_path / "0").exists()
    faults = {now: watch.fault(now) for now in range(0, 220, 10)}
    assert faults[200] is None  # rank 1 is another machine's and was not seen yet
    assert "rank 0 (which never began)" in str(faults[210])


def test_the_time_in_which_a_job_was_suspended_counts_for_nobody(tmp_path: Path) -> None:
    watch = RankWatch(tmp_path, 1, range(1), limit=100, now=0)
    write(tmp_path, 0, count=1, moves=1)
    assert watch.fault(1) is None
    assert watch.fault(5000) is None
    faults = [watch.fault(5000 + seconds) for seconds in range(0, 70, 10)]
    assert faults[:6] == [None] * 6
    assert faults[6] is not None


def test_a_heart_beats_in_place_and_says_what_changed_at_once(tmp_path: Path) -> None:
    heart = Heart(tmp_path, "3", limit=600)
    heart.say(moved=True)
    heart.say(state=TRAINING, token="t")
    beat = Beat.read(tmp_path / "3")
    assert beat is not None
    assert (beat.moves, beat.state, beat.token, beat.pid) == (1, TRAINING, "t", os.getpid())
    assert beat.host == socket.gethostname()[:64]
    heart.end()
    assert Beat.read(tmp_path / "3").state == ENDED  # type: ignore[union-attr]
    assert (tmp_path / "3").stat().st_size == RECORD_BYTES


def test_another_node_waits_for_node_0_for_a_bounded_time(tmp_path: Path) -> None:
    lines: list[str] = []
    launch = Launch(nnodes=2, node_rank=1, ddp_timeout=0.5)
    with pytest.raises(TrainError, match=r"node 1 saw no sign of life of node 0 .* share\?"):
        train_along(tmp_path, 2, launch, lambda: False, lines.append)
    assert lines == ["note: node 1 waits for node 0 to prepare the data"]
    assert train_along(tmp_path, 2, launch, lambda: True, lines.append) is False


SUMMARY = b"""E1123 10:00:00.0 1 torch/elastic/api.py:1002] failed (exitcode: -11) local_rank: 1 (pid: 11)
Traceback (most recent call last):
[1]:
  time      : 2026-11-23_10:00:31
  rank      : 2 (local_rank: 2)
  exitcode  : -9 (pid: 12)
[2]:
  time      : 2026-11-23_10:00:01
  rank      : 0 (local_rank: 0)
  exitcode  : -15 (pid: 10)
Root Cause (first observed failure):
  time      : 2026-11-23_10:00:00
  rank      : 1 (local_rank: 1)
  exitcode  : -11 (pid: 11)
""".split(b"\n")


def test_one_reason_is_given_of_all_that_was_said() -> None:
    said = Said(lambda _: None)
    for line in (b"step 1/2", b"lost: " + json.dumps("rank 0 waited").encode(), *SUMMARY):
        said.hear(line)
    assert said.reason(1, "rank 1 is behind", LOG) == "rank 1 ended with status -11 (SIGSEGV); full log: train.log"
    said.hear(b"fault: " + json.dumps("the disk is full").encode())
    assert said.reason(1, None, LOG) == "the disk is full; full log: train.log"


def test_ranks_that_waited_in_vain_tell_who_is_behind() -> None:
    said = Said(lambda _: None)
    said.hear(b"lost: " + json.dumps("rank 0 waited").encode())
    assert (
        said.reason(1, "furthest behind: rank 1", LOG) == "rank 0 waited; furthest behind: rank 1; full log: train.log"
    )


def test_machines_that_do_not_come_are_told_in_torchs_words() -> None:
    said = Said(lambda _: None)
    said.hear(b"torch.distributed.DistStoreError: Timed out after 16 seconds waiting for clients. 1/2 clients joined.")
    assert "come together: Timed out after 16 seconds waiting for clients. 1/2 clients joined. Does" in said.reason(
        1, None, LOG
    )
