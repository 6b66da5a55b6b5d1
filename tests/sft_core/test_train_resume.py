"""A run that was killed, torn or cut short ends with the bytes of one that was not."""

import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sft_core.artifacts import StoredFile
from sft_core.errors import TrainError
from sft_core.train import TrainInputs, train_adapter
from sft_core.train.checkpoints import (
    COMPLETE,
    Counts,
    complete_checkpoints,
    keep_newest,
    mark_complete,
    newest_complete,
    read_mark,
)
from sft_core.train.metrics import read_metrics
from sft_core.train.world_size import going_on
from tests.sft_core.train_runs import child_of, config, losses, train, train_here, weights_hash

HASH_OF_1234 = "03ac674216f3e15c761ee1a5e255f067953623c8b388b4459e13f978d7c846f4"
"""By sha256sum."""
LAST = 30
"""Optimizer steps; five kills use up fewer."""
CONFIG = config(
    lora={"lora_dropout": 0.1},
    max_steps=LAST,
    num_train_epochs=LAST,
    gradient_accumulation_steps=2,
    save_steps=1,
    save_total_limit=2,
)
"""With dropout, so that the random numbers have to go on where they were, too."""
LONGEST_DELAY = 0.2
"""Seconds from a progress line to the kill: about two optimizer steps and their checkpoints."""
METHODS = {
    "plain": CONFIG,
    "zero3": CONFIG.model_copy(update={"deepspeed": "zero3", "max_steps": 8}),
    "whole model": config(lora=None, max_steps=6, gradient_accumulation_steps=2, save_steps=1),
}


@pytest.fixture(scope="module")
def straight(packed: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `work` and `out` of an uninterrupted run of CONFIG, in this process."""
    folder = tmp_path_factory.mktemp("straight")
    train_here(packed, tiny_model, folder, CONFIG)
    return folder


def kill_once(packed: Path, model: Path, folder: Path, section: object, draw: random.Random) -> None:
    """Start the run; kill -9 its process a random while after a line of progress that finds a complete checkpoint."""
    lines, delay = draw.randint(1, 2), draw.uniform(0, LONGEST_DELAY)
    seen: list[str] = []
    killed: list[int] = []

    def kill(line: str) -> None:
        if line.startswith("step "):
            seen.append(line)
        if len(seen) < lines or killed:  # lines that it wrote before come after its end
            return
        rank = child_of(os.getpid())
        os.kill(rank, signal.SIGSTOP)  # or checkpoints come and go while they are looked at
        there = complete_checkpoints(folder / "work")
        os.kill(rank, signal.SIGCONT)
        if there:
            time.sleep(delay)
            os.kill(rank, signal.SIGKILL)
            killed.append(rank)

    with pytest.raises(TrainError, match="ended with status -9"):
        train(packed, model, folder, section, kill)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_with_the_same_bytes(
    straight: Path, packed: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """Three kills here; `benchmarks/kill_resume.py` takes as many as wanted, of several ways of training."""
    draw = random.Random(2)
    for _ in range(3):
        kill_once(packed, tiny_model, tmp_path, CONFIG, draw)
    out = train(packed, tiny_model, tmp_path, CONFIG)
    assert weights_hash(out) == weights_hash(straight / "out")
    assert losses(out) == losses(straight / "out")
    counted = [read_metrics(folder / "metrics.jsonl")[-1]["supervised_tokens"] for folder in (out, straight / "out")]
    assert counted[0] == counted[1] > 0


@pytest.mark.slow
def test_a_run_killed_after_its_last_checkpoint_takes_no_step_more(
    packed: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """The data would last for more steps than `max_steps`."""
    section = config(max_steps=2, num_train_epochs=9)
    expected = train_here(packed, tiny_model, tmp_path / "run", section)
    again = train_here(packed, tiny_model, tmp_path / "run", section)
    assert losses(again) == losses(expected)
    assert [path.name for path in (tmp_path / "run" / "work").glob("checkpoint-*")] == ["checkpoint-2"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["zero3", "whole model"])
def test_other_methods_resume_to_the_same_bytes(method: str, packed: Path, tiny_model: Path, tmp_path: Path) -> None:
    section = METHODS[method]
    expected = (train if section.deepspeed else train_here)(packed, tiny_model, tmp_path / "straight", section)
    kill_once(packed, tiny_model, tmp_path / "killed", section, random.Random(3))
    lines: list[str] = []
    found = train(packed, tiny_model, tmp_path / "killed", section, lines.append)
    assert any(line.startswith("resuming from checkpoint-") for line in lines)
    assert not any("passed over" in line for line in lines)  # each of its files is read as data before it is loaded
    assert weights_hash(found) == weights_hash(expected)
    assert losses(found) == losses(expected)


@pytest.mark.slow
def test_a_checkpoint_torn_at_any_file_leaves_the_one_before(straight: Path, tmp_path: Path) -> None:
    work = straight / "work"
    assert newest_complete(work) == work / f"checkpoint-{LAST}"
    files = [path.relative_to(work) for path in (work / f"checkpoint-{LAST}").rglob("*") if path.is_file()]
    assert {"adapter_model.safetensors", "optimizer.pt", "scheduler.pt", COMPLETE} <= {path.name for path in files}
    draw = random.Random(0)
    for number, name in enumerate(files):
        size = (work / name).stat().st_size
        for cut in {0, size - 1, draw.randrange(size)} if size else set():
            copy = tmp_path / f"{number}-{cut}"
            shutil.copytree(work, copy)
            os.truncate(copy / name, cut)
            assert newest_complete(copy) == copy / f"checkpoint-{LAST - 1}", f"{name} cut at {cut} of {size}"
            shutil.rmtree(copy)
        shutil.copytree(work, tmp_path / "missing")
        (tmp_path / "missing" / name).unlink()
        assert newest_complete(tmp_path / "missing") == tmp_path / "missing" / f"checkpoint-{LAST - 1}"
        shutil.rmtree(tmp_path / "missing")


def test_ranks_that_cannot_share_a_step_s_rows_are_refused_before_anything_starts(tmp_path: Path) -> None:
    checkpoint = tmp_path / "work" / "checkpoint-3"
    checkpoint.mkdir(parents=True)
    mark_complete(checkpoint, 4, Counts(), micro_batches=8)
    inputs = TrainInputs(packed=tmp_path, base_model=tmp_path, trust_remote_code=False, work=tmp_path / "work")
    three = CONFIG.model_copy(update={"num_processes": 3})
    with pytest.raises(TrainError, match=r"written by 4 ranks, 8 micro-batches .*num_processes to one of 1, 2, 4, 8"):
        train_adapter(inputs, three, 7, tmp_path / "out")
    two = CONFIG.model_copy(update={"num_processes": 2, "deepspeed": "zero3"})
    with pytest.raises(TrainError, match=r"by 4 ranks, this run has 2: .*not under ZeRO-3. Set train.num_processes: 4"):
        train_adapter(inputs, two, 7, tmp_path / "out")
    assert not (tmp_path / "work" / "train.log").exists()


@pytest.mark.parametrize(
    ("written", "wanted", "expected"),
    [
        ({"world_size": 4, "micro_batches": 8}, {}, (8, True)),
        ({"world_size": 4, "micro_batches": 8}, {"num_processes": 4}, (2, False)),
        ({"world_size": 2, "micro_batches": 8}, {"num_processes": 2}, (4, False)),  # 4 ranks began, 2 went on
        ({"world_size": 4, "micro_batches": 4}, {"num_processes": 2, "sequence_parallel_size": 2}, (4, True)),
        ({"world_size": 2}, {}, (4, True)),  # by a version that did not note them
    ],
)
def test_an_optimizer_step_keeps_its_rows(
    written: dict[str, int], wanted: dict[str, int], expected: tuple[int, bool], tmp_path: Path
) -> None:
    (tmp_path / "checkpoint-3").mkdir()
    mark_complete(tmp_path / "checkpoint-3", counts=Counts(), **written)
    section = CONFIG.model_copy(update={"num_processes": 1, **wanted})
    found, resize = going_on(tmp_path / "checkpoint-3", section, section.num_processes or 1)
    assert (found.gradient_accumulation_steps, resize) == expected


@pytest.fixture
def small_files() -> Iterator[None]:
    """Files of this process and its children end at 64 kB, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.slow
def test_a_full_disk_ends_the_run_with_one_error_and_keeps_the_last_checkpoint(
    straight: Path, packed: Path, tiny_model: Path, tmp_path: Path, small_files: None
) -> None:
    shutil.rmtree(tmp_path / "work", ignore_errors=True)
    for name in (f"checkpoint-{LAST - 1}", "metrics.jsonl"):
        source = straight / "work" / name
        link(source, tmp_path / "work" / name)
    with pytest.raises(TrainError, match=rf"checkpoint-{LAST} could not be written \(.*Earlier checkpoints") as fault:
        train(packed, tiny_model, tmp_path, CONFIG)
    assert "Traceback" not in str(fault.value)
    assert newest_complete(tmp_path / "work") == tmp_path / "work" / f"checkpoint-{LAST - 1}"
    assert not (tmp_path / "work" / f"checkpoint-{LAST}").exists()


def link(source: Path, target: Path) -> None:
    """The same files under another name: nothing can be written under the limit."""
    if source.is_dir():
        shutil.copytree(source, target, copy_function=os.link)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)


def test_torn_checkpoints_are_deleted_and_the_newest_whole_one_is_taken(tmp_path: Path) -> None:
    for step, whole in ((3, True), (10, True), (12, False)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "weights").write_bytes(b"1234")
        if whole:
            mark_complete(tmp_path / f"checkpoint-{step}", 2, Counts(tokens=step))
    assert newest_complete(tmp_path) == tmp_path / "checkpoint-10"
    assert not (tmp_path / "checkpoint-12").exists()
    mark = read_mark(tmp_path / "checkpoint-10")
    assert mark is not None
    assert (mark.world_size, mark.counts, mark.files) == (
        2,
        Counts(tokens=10),
        {"weights": StoredFile(4, HASH_OF_1234)},
    )
    keep_newest(tmp_path, 1)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-10"]
