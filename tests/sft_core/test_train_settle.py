"""`auto` in a recipe: what a run puts in its place, that it is said and kept, and that what is trained stays."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from sft_core.artifacts import Outcome
from sft_core.errors import RecipeError
from sft_core.recipe import TrainConfig
from sft_core.train import TrainInputs, chosen_split, train_adapter
from sft_core.train.checkpoints import COMPLETE, Counts, mark_complete, read_mark
from sft_core.train.settle import free_bytes
from sft_core.train.world_size import going_on
from sft_core.train.zero import deepspeed_config
from tests.sft_core.train_runs import assert_same_run, config, train_here, train_together

AUTO = config(per_device_train_batch_size="auto", gradient_checkpointing="auto", save_steps=2, save_total_limit=9)


@pytest.fixture(scope="module")
def plain(packed: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One row at a time, four an optimizer step, nothing recomputed."""
    return train_here(packed, tiny_model, tmp_path_factory.mktemp("plain"), config())


def train(packed: Path, model: Path, folder: Path, section: TrainConfig) -> tuple[Outcome, list[str]]:
    """The real child process; what it made is in `folder/out`."""
    lines: list[str] = []
    inputs = TrainInputs(packed=packed, base_model=model, trust_remote_code=False, work=folder / "work")
    return train_adapter(inputs, section, 7, folder / "out", lines.append), lines


def said(lines: list[str]) -> str:
    (line,) = (line for line in lines if line.startswith("note: memory: "))
    return line


@pytest.fixture(scope="module")
def chosen(packed: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome, list[str]]:
    """AUTO's folder with `work` and `out`, its outcome and its lines."""
    folder = tmp_path_factory.mktemp("chosen")
    return folder, *train(packed, tiny_model, folder, AUTO)


@pytest.mark.slow
def test_what_was_chosen_is_said_with_its_sum_and_trains_the_same(
    chosen: tuple[Path, Outcome, list[str]], plain: Path
) -> None:
    folder, outcome, lines = chosen
    assert_same_run(folder / "out", plain)
    rows, times = (outcome.facts[key] for key in ("per_device_train_batch_size", "gradient_accumulation_steps"))
    assert rows * times == 4
    assert outcome.facts["checkpointed_every_n_layers"] == 0  # there is memory enough for so small a model
    assert f"{rows} packed row" in said(lines)
    assert "no layer recomputed: about" in said(lines)
    assert " + activations " in said(lines)
    mark = read_mark(folder / "out" / "checkpoint")
    assert mark is not None
    assert (mark.rows_at_once, mark.micro_batches, mark.checkpoint_every) == (rows, times, 0)


@pytest.mark.slow
def test_two_ranks_choose_alike(plain: Path, packed: Path, tiny_model: Path, tmp_path: Path) -> None:
    shared = AUTO.model_copy(update={"num_processes": 2, "gradient_accumulation_steps": 2})
    sections = {"plain": shared, "zero2": shared.model_copy(update={"deepspeed": "zero2"})}
    for name, out in train_together(packed, tiny_model, tmp_path, sections).items():
        assert_same_run(out, plain)
        mark = read_mark(out / "checkpoint")
        assert mark is not None
        split = chosen_split(mark, sections[name], 2)
        assert split["per_device_train_batch_size"] * split["gradient_accumulation_steps"] == 2


@pytest.mark.slow
def test_a_run_that_goes_on_stays_as_it_was_split(
    chosen: tuple[Path, Outcome, list[str]], plain: Path, packed: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """Two rows at once, all recomputed, as its checkpoint says; nobody would choose that anew."""
    begun = tmp_path / "on" / "work" / "checkpoint-2"
    shutil.copytree(chosen[0] / "work" / "checkpoint-2", begun)
    shutil.copy(chosen[0] / "out" / "metrics.jsonl", tmp_path / "on" / "work")
    value = json.loads((begun / COMPLETE).read_text("utf-8"))
    (begun / COMPLETE).write_text(json.dumps(value | {"rows_at_once": 2, "checkpoint_every": 1, "micro_batches": 2}))
    outcome, lines = train(packed, tiny_model, tmp_path / "on", AUTO)
    assert any(line.startswith("resuming from checkpoint-2") for line in lines)
    assert "2 packed rows at once x 2, all layers recomputed: about" in said(lines)
    assert outcome.facts["per_device_train_batch_size"] == 2
    assert_same_run(tmp_path / "on" / "out", plain)


def test_another_number_of_ranks_shares_the_same_rows(tmp_path: Path) -> None:
    """One rank, two micro-batches of three rows: six rows."""
    mark_complete(tmp_path, 1, Counts(), 2, (3, 0))
    section = AUTO.model_copy(update={"gradient_accumulation_steps": 6})
    for ranks, rows in ((1, 6), (2, 3), (3, 2), (6, 1)):
        found, resizes = going_on(tmp_path, section, ranks)
        assert (found.gradient_accumulation_steps, resizes) == (rows, ranks != 1)


def test_a_deepspeed_file_leaves_the_split_to_the_run_too(tmp_path: Path) -> None:
    file = tmp_path / "deepspeed.json"
    for key in ("gradient_accumulation_steps", "train_micro_batch_size_per_gpu"):
        file.write_text(json.dumps({"zero_optimization": {"stage": 2}, key: 4}))
        section = AUTO.model_copy(update={"deepspeed": str(file)})
        with pytest.raises(RecipeError, match=f"{key} is 4, the recipe's train section means 'auto'"):
            deepspeed_config(section)


def test_free_memory_of_a_cpu_is_shared_by_its_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = free_bytes(torch.device("cpu"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert 0 < free_bytes(torch.device("cpu")) == pytest.approx(whole / 4, rel=0.2)
