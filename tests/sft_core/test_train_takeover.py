"""Two trainers of one training, the first suspended past its lease: the second's result is right to the bit, and the
first ends with one error, having touched nothing of the second's. Real processes, a store on a disk."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sft_core.plan import plan_recipe
from sft_core.recipe import resolve
from sft_core.steps import Retraining, run_step
from sft_core.store import Store, list_files
from sft_core.train.metrics import read_metrics
from tests.sft_core.train_runs import child_of, train_here, weights_hash

pytestmark = pytest.mark.slow

LONG = 300.0
"""Bound on a wait; a training takes some 20 s."""
EVERY_STEP = list(range(1, 41))
RECIPE = """
name: two
seed: 7
store: ./store
base_model: {path: base}
datasets: [{path: rows.jsonl, map_fn: "reader.py:read"}]
eval_fraction: 0.2
pack: {max_length: 64, chat_template: chatml}
train:
  dtype: float32
  quantization: none
  deepspeed: null
  lora: {r: 4, lora_alpha: 8, lora_dropout: 0.1}
  max_steps: 40
  num_train_epochs: 72
  save_steps: 2
  per_device_train_batch_size: 2
  gradient_accumulation_steps: 8
  learning_rate: 1.0e-2
  gradient_checkpointing: false
  logging_steps: 1
"""
READER = """
def read(row):
    return {"conversation": [{"input": row["ask"], "output": row["say"]}]}
"""
TRAINER = """
import sys
from sft_core import lease
lease.LEASE_SECONDS, lease.LOOK_SECONDS = 4.0, 0.2
from sft_core.errors import SftError
from sft_core.plan import plan_recipe
from sft_core.recipe import resolve
from sft_core.steps import Retraining, run_step
from sft_core.store import Store
recipe = resolve("recipe.yaml")
run = Retraining(recipe, plan_recipe(recipe), Store(recipe.store), lambda line: print(line, flush=True))
try:
    built = run_step(run, "train")
except SftError as error:
    sys.exit(f"error: {error}")
print("reused" if built.reused else "built", flush=True)
"""


STARTED: list["subprocess.Popen[str]"] = []


@pytest.fixture(autouse=True)
def nobody_is_left() -> Iterator[None]:
    """A test that fails leaves suspended processes behind, which hold what they hold until the machine ends."""
    yield
    for process in STARTED:
        process.kill()
    STARTED.clear()


class Trainer:
    """A process that trains `recipe.yaml` of a folder; its lines are read as they come."""

    def __init__(self, folder: Path) -> None:
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, "-c", TRAINER],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        STARTED.append(self.process)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    def wait_for(self, wanted: Callable[[str], bool]) -> None:
        """Until a line is as wanted."""
        deadline = time.monotonic() + LONG
        while not any(wanted(line) for line in list(self.lines)):
            assert time.monotonic() < deadline, self.lines
            assert self.process.poll() is None or any(map(wanted, self.lines)), self.lines
            time.sleep(0.02)

    def end(self) -> int:
        """Its exit status; all lines are read."""
        status = self.process.wait(LONG)
        self._reader.join(LONG)
        return status


@pytest.fixture(scope="module")
def prepared(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose rows are packed."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copytree(tiny_model, folder / "base")
    rows = [{"ask": f"say w{i}", "say": f"w{i} w{i + 1}"} for i in range(80)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "reader.py").write_text(READER)
    (folder / "recipe.yaml").write_text(RECIPE)
    here = Path.cwd()
    os.chdir(folder)
    try:
        recipe = resolve("recipe.yaml")
        plan = plan_recipe(recipe)
        for key in plan.steps:
            if key.startswith("fetch/") or key in ("normalize", "pack"):
                run_step(Retraining(recipe, plan, Store(recipe.store), lambda _: None), key)
    finally:
        os.chdir(here)
    return folder


@pytest.fixture(scope="module")
def straight(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Hash of the adapter of a training that nobody disturbed, in this process."""
    (packed,) = (prepared / "store" / "pack").iterdir()
    section = resolve(str(prepared / "recipe.yaml")).train
    return weights_hash(train_here(packed, prepared / "base", tmp_path_factory.mktemp("straight"), section))


def artifact(folder: Path) -> Path:
    (found,) = (folder / "store" / "train").iterdir()
    return found


def step_line(least: int) -> Callable[[str], bool]:
    return lambda line: line.startswith("step ") and int(line.split()[1].partition("/")[0]) >= least


def await_end(pid: int) -> None:
    """Until a process has ended; its parent, which is suspended, has not taken notice."""
    deadline = time.monotonic() + LONG
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("suspended", "back"),
    [("parent and rank", "while the second trains"), ("the parent", "after the second is done")],
)
def test_a_trainer_that_lost_its_lease_leaves_the_next_one_alone(
    prepared: Path, straight: str, tmp_path: Path, suspended: str, back: str
) -> None:
    folder = shutil.copytree(prepared, tmp_path / "project")
    first = Trainer(folder)
    first.wait_for(step_line(5))
    rank = child_of(first.process.pid)
    os.kill(first.process.pid, signal.SIGSTOP)
    if suspended == "parent and rank":
        os.kill(rank, signal.SIGSTOP)
    second = Trainer(folder)
    second.wait_for(lambda line: "taking over" in line)
    second.wait_for(step_line(1))
    if back == "after the second is done":
        assert second.end() == 0
    if suspended == "parent and rank":
        os.kill(rank, signal.SIGCONT)
        await_end(rank)
    os.kill(first.process.pid, signal.SIGCONT)
    assert first.end() == 1, first.lines
    assert second.end() == 0, second.lines
    errors = [line for line in first.lines if line.startswith("error: ")]
    assert len(errors) == 1
    assert "this process was silent for over 4 s, and another one took over" in errors[0]
    assert second.lines[-1] == "built"
    resumed = [line for line in second.lines if line.startswith("resuming from checkpoint-")]
    assert len(resumed) == 1  # it went on from where the first was
    assert weights_hash(artifact(folder)) == straight
    assert [entry["optimizer_step"] for entry in read_metrics(artifact(folder) / "metrics.jsonl")] == EVERY_STEP
    run = Store(str(folder / "store"))
    manifest = run.find("train", artifact(folder).name)
    assert manifest is not None
    there = {name: entry for name, entry in list_files(artifact(folder)).items() if name != "manifest.json"}
    assert there == manifest.files  # no file of the first beside it, and each as it was written


def test_a_rank_does_not_outlive_its_suspended_launcher_for_long(prepared: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(prepared, tmp_path / "project")
    (folder / "recipe.yaml").write_text(RECIPE.replace("max_steps: 40", "max_steps: 4000").replace(": 72", ": 7200"))
    first = Trainer(folder)
    first.wait_for(step_line(3))
    rank = child_of(first.process.pid)
    os.kill(first.process.pid, signal.SIGSTOP)
    try:
        await_end(rank)
    finally:
        os.kill(first.process.pid, signal.SIGCONT)
    assert first.end() == 1
    errors = [line for line in first.lines if line.startswith("error: ")]
    assert len(errors) == 1
    assert "the process that started this training was silent for 3 s" in errors[0]
