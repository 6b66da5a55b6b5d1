"""A checkpoint whose bytes changed on the disk is passed over, and one that holds a program is not loaded."""

import os
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest

from sft_core.errors import TrainError
from sft_core.train.checkpoints import COMPLETE, Counts, mark_complete
from sft_core.train.sound import newest_sound
from tests.sft_core.train_runs import config, losses, train, train_here, weights_hash

CONFIG = config(
    lora={"lora_dropout": 0.1}, max_steps=4, gradient_accumulation_steps=1, save_steps=1, save_total_limit=3
)


def flip(path: Path) -> None:
    """Eight bytes in its middle are others; the size stays."""
    data = bytearray(path.read_bytes())
    middle = max(0, len(data) // 2 - 4)
    data[middle : middle + 8] = bytes(byte ^ 0xFF for byte in data[middle : middle + 8])
    path.write_bytes(data)


def cut_to(folder: Path, source: Path, step: int) -> Path:
    """The work folder as it was after `step` of the run in `source`."""
    shutil.copytree(source / "work", folder / "work")
    for path in (folder / "work").glob("checkpoint-*"):
        if int(path.name.removeprefix("checkpoint-")) > step:
            shutil.rmtree(path)
    return folder / "work"


@pytest.fixture(scope="module")
def straight(packed: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    train_here(packed, tiny_model, folder, CONFIG)
    return folder


@pytest.mark.slow
def test_any_file_of_a_checkpoint_that_changed_is_found(straight: Path, tmp_path: Path) -> None:
    names = [p.relative_to(straight / "work" / "checkpoint-3") for p in (straight / "work" / "checkpoint-3").rglob("*")]
    expected = {"adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
    assert expected <= {name.name for name in names}
    for number, name in enumerate(name for name in names if name.name != COMPLETE):
        work = cut_to(tmp_path / str(number), straight, 3)
        flip(work / "checkpoint-3" / name)
        lines: list[str] = []
        assert newest_sound(work, lines.append) == work / "checkpoint-2"
        assert len(lines) == 1
        assert lines[0].startswith(f"note: {work / 'checkpoint-3' / name}: its bytes are not those that were written;")
        assert newest_sound(work, lines.append) == work / "checkpoint-2"
        assert len(lines) == 1  # said once: it is gone


@pytest.mark.slow
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(
    straight: Path, packed: Path, tiny_model: Path, tmp_path: Path
) -> None:
    work = cut_to(tmp_path, straight, 3)
    flip(work / "checkpoint-3" / "optimizer.pt")
    flip(work / "packed.arrow")
    lines: list[str] = []
    out = train(packed, tiny_model, tmp_path, CONFIG, lines.append)
    assert sum("checkpoint-3 is passed over" in line for line in lines) == 1
    assert "resuming from checkpoint-2 of 4 optimizer steps" in lines
    assert weights_hash(out) == weights_hash(straight / "out")
    assert losses(out) == losses(straight / "out")


@pytest.mark.slow
def test_a_result_that_was_damaged_before_it_was_taken_is_none(
    straight: Path, packed: Path, tiny_model: Path, tmp_path: Path
) -> None:
    work = cut_to(tmp_path, straight, 4)

    def damage(line: str) -> None:
        if line.startswith("resuming from checkpoint-4"):
            flip(work / "checkpoint-4" / "adapter_model.safetensors")

    with pytest.raises(TrainError, match="training is done, but .*checkpoint-4 was damaged"):
        train(packed, tiny_model, tmp_path, CONFIG, damage)
    shutil.rmtree(tmp_path / "out")
    assert weights_hash(train(packed, tiny_model, tmp_path, CONFIG)) == weights_hash(straight / "out")


class Program:
    """What a pickle runs when it is loaded by Python."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self._path),)


def test_a_checkpoint_of_deepspeed_that_holds_a_program_is_passed_over_and_nothing_runs(tmp_path: Path) -> None:
    """Its hashes are right: whoever wrote it wrote the mark as well."""
    for step in (1, 2):
        state = tmp_path / f"checkpoint-{step}" / f"global_step{step}"
        state.mkdir(parents=True)
        (state.parent / "trainer_state.json").write_text('{"log_history": []}')
        content = {"step": step} if step == 1 else {"step": Program(tmp_path / "ran")}
        with zipfile.ZipFile(state / "mp_rank_00_model_states.pt", "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(content, protocol=2))
        mark_complete(state.parent, 1, Counts())
    lines: list[str] = []
    assert newest_sound(tmp_path, lines.append) == tmp_path / "checkpoint-1"
    assert len(lines) == 1
    assert "mp_rank_00_model_states.pt: the pickle names posix.mkdir" in lines[0]
    assert not (tmp_path / "ran").exists()


def test_the_best_checkpoint_has_to_be_sound_too(tmp_path: Path) -> None:
    history = ['{"step": 1, "eval_loss": 2.0}', '{"step": 2, "eval_loss": 1.0}', '{"step": 3, "eval_loss": 3.0}']
    for step in (1, 2, 3):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "weights").write_bytes(bytes(64))
        (folder / "trainer_state.json").write_text(f'{{"log_history": [{", ".join(history[:step])}]}}')
        mark_complete(folder, 1, Counts())
    flip(tmp_path / "checkpoint-2" / "weights")
    assert newest_sound(tmp_path, lambda _: None) == tmp_path / "checkpoint-3"
    assert newest_sound(tmp_path, lambda _: None, with_best=True) == tmp_path / "checkpoint-1"
