"""Training, for real: a child process with DeepSpeed ZeRO-2 on a 4-bit base, on CPU."""

import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sft_core.errors import TrainError
from sft_core.pack import pack_dataset
from sft_core.recipe import LoraConfig, PackConfig, TrainConfig
from sft_core.train import TrainInputs, train_adapter
from sft_core.train.checkpoints import COMPLETE, newest_complete
from sft_core.train.launch import training_command
from sft_core.train.metrics import append_metrics, read_metrics, rewind_metrics
from tests.sft_core.train_runs import child_of, config, train_here, weights, weights_hash

LORA = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1)
CONFIG = TrainConfig(
    lora=LORA,
    dtype="float32",
    num_train_epochs=2,
    per_device_train_batch_size=1,
    gradient_accumulation_steps=2,
    learning_rate=1e-2,
    gradient_checkpointing=False,
    save_steps=3,
    save_total_limit=10,
    logging_steps=1,
)


@pytest.fixture(scope="module")
def packed(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, write_conversations: Callable[..., Path]
) -> Path:
    folder = tmp_path_factory.mktemp("data")
    conversations = write_conversations(folder / "conversations", 40, 4)
    pack_dataset(conversations, tiny_model, PackConfig(max_length=128, chat_template="chatml"), 42, folder / "packed")
    return folder / "packed"


def inputs(packed: Path, model: Path, work: Path) -> TrainInputs:
    return TrainInputs(packed=packed, base_model=model, trust_remote_code=False, work=work)


@pytest.fixture(scope="module")
def straight(packed: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run; `work` and `out` below."""
    folder = tmp_path_factory.mktemp("straight")
    lines: list[str] = []
    outcome = train_adapter(inputs(packed, tiny_model, folder / "work"), CONFIG, 7, folder / "out", lines.append)
    assert lines[0].startswith("note: attention packed_documents (SDPA document by document")
    assert lines[0].endswith("loss selected (a vocabulary of 259 is small), LoRA by addmm in 14 of 14 layers")
    assert re.fullmatch(r"note: warm-up: \d+ of \d+ optimizer steps, the first at 0\.0\d+", lines[1]), lines[1]
    assert lines[2].startswith("step 1/")
    assert outcome.facts["last_loss"] < outcome.facts["first_loss"]
    return folder


@pytest.mark.slow
def test_every_optimizer_step_is_logged_once_with_finite_figures(straight: Path) -> None:
    metrics = read_metrics(straight / "out" / "metrics.jsonl")
    steps = [entry["optimizer_step"] for entry in metrics]
    assert steps == list(range(1, metrics[0]["max_steps"] + 1))
    assert metrics[-1]["epoch"] == 2.0
    assert all(entry["loss"] > 0 and entry["tokens_per_second"] > 0 for entry in metrics)


@pytest.mark.slow
def test_every_supervised_token_of_every_epoch_is_trained_exactly_once(straight: Path, packed: Path) -> None:
    import pyarrow.parquet as pq

    table = pq.read_table(packed / "sequences")
    supervised = sum(label != -100 for row in table.column("labels").to_pylist() for label in row)
    assert read_metrics(straight / "out" / "metrics.jsonl")[-1]["supervised_tokens"] == 2 * supervised


@pytest.mark.slow
def test_all_linear_layers_but_the_head_are_adapted(straight: Path) -> None:
    names = weights(straight / "out").keys()
    targets = {name.split(".")[-3] for name in names}
    assert targets == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert len(names) == 2 * 7 * 2  # layers, modules, A and B


@pytest.mark.slow
def test_a_stopped_run_saves_and_the_same_call_ends_with_the_same_bytes(
    straight: Path, packed: Path, tiny_model: Path, tmp_path: Path
) -> None:
    def stop_child(line: str) -> None:
        if line.startswith("step 2/"):
            os.kill(child_of(os.getpid()), signal.SIGTERM)

    with pytest.raises(TrainError, match="stopped by SIGTERM; its finished optimizer steps are saved"):
        train_adapter(inputs(packed, tiny_model, tmp_path / "work"), CONFIG, 7, tmp_path / "first", stop_child)
    saved = newest_complete(tmp_path / "work")
    assert saved is not None
    torn = saved.with_name(f"checkpoint-{int(saved.name.removeprefix('checkpoint-')) + 1}")
    shutil.copytree(saved, torn)
    (torn / COMPLETE).unlink()  # as if killed while saving one more
    lines: list[str] = []
    train_adapter(inputs(packed, tiny_model, tmp_path / "work"), CONFIG, 7, tmp_path / "out", lines.append)
    assert lines[1].startswith(f"resuming from {saved.name}")
    assert weights_hash(tmp_path / "out") == weights_hash(straight / "out")
    steps = [entry["optimizer_step"] for entry in read_metrics(tmp_path / "out" / "metrics.jsonl")]
    assert steps == list(range(1, steps[-1] + 1))


@pytest.mark.slow
def test_two_ranks_asked_to_stop_at_different_moments_stop_at_the_same_step(
    packed: Path, tiny_model: Path, tmp_path: Path
) -> None:
    section = CONFIG.model_copy(update={"num_processes": 2, "num_train_epochs": 40, "quantization": "none"})

    def stop_one_rank(line: str) -> None:
        if line.startswith("step 2/"):
            ranks = [int(p.name) for p in Path("/proc").glob("[0-9]*") if is_rank(p, tmp_path)]
            os.kill(max(ranks), signal.SIGTERM)

    with pytest.raises(TrainError):
        train_adapter(inputs(packed, tiny_model, tmp_path / "work"), section, 7, tmp_path / "out", stop_one_rank)
    saved = newest_complete(tmp_path / "work")
    assert saved is not None
    assert 2 <= int(saved.name.removeprefix("checkpoint-")) < 100


def is_rank(process: Path, folder: Path) -> bool:
    """Whether this /proc folder is a training rank (not its launcher) of the run below `folder`."""
    try:
        command = (process / "cmdline").read_bytes()
    except OSError:
        return False
    return str(folder).encode() in command and b"torch.distributed.run" not in command


@pytest.mark.slow
def test_an_exception_in_the_parent_ends_the_child(packed: Path, tiny_model: Path, tmp_path: Path) -> None:
    children: list[int] = []

    def fail(line: str) -> None:
        children.append(child_of(os.getpid()))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_adapter(inputs(packed, tiny_model, tmp_path / "work"), config(), 7, tmp_path / "out", fail)
    assert not Path(f"/proc/{children[0]}").exists()


@pytest.mark.slow
def test_a_failing_child_gives_its_last_lines(packed: Path, tiny_model: Path, tmp_path: Path) -> None:
    torn = shutil.copytree(packed, tmp_path / "torn")
    (torn / "bins.parquet").write_text("no Parquet at all")
    with pytest.raises(TrainError, match="status 1; full log: ") as fault:
        train_adapter(inputs(torn, tiny_model, tmp_path / "work"), config(), 7, tmp_path / "out")
    assert "Parquet" in str(fault.value)


def test_one_rank_needs_no_launcher_and_several_go_through_torchrun(tmp_path: Path) -> None:
    assert "torch.distributed.run" not in training_command(tmp_path, 1)
    assert "--nproc_per_node=3" in training_command(tmp_path, 3)


def test_metrics_are_rewound_to_a_step_and_a_torn_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2, 3):
        append_metrics(path, {"optimizer_step": step})
    with path.open("a") as file:
        file.write('{"optimizer_st')
    assert [entry["optimizer_step"] for entry in read_metrics(path)] == [1, 2, 3]
    rewind_metrics(path, 2)
    assert [entry["optimizer_step"] for entry in read_metrics(path)] == [1, 2]


@pytest.mark.parametrize("leaks", [False, True])
def test_the_isolation_probe_passes_a_sound_model_and_stops_a_leaking_one(tiny_model: Path, leaks: bool) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from sft_core.train.isolation import check_isolation

    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model)
    if not leaks:
        assert check_isolation(model, model.config.vocab_size) < 1e-5
        return

    class Leaking(torch.nn.Module):
        """Drops position_ids, as a kernel does that does not know of packing."""

        def __init__(self) -> None:
            super().__init__()
            self.inner, self.config = model, model.config

        def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, use_cache: bool) -> Any:
            return self.inner(input_ids=input_ids, use_cache=use_cache)

    with pytest.raises(TrainError, match="packed documents see each other"):
        check_isolation(Leaking(), model.config.vocab_size)


@pytest.mark.parametrize("logging_steps", [2, 3, 100])
def test_the_first_and_the_last_optimizer_step_are_logged(
    packed: Path, tiny_model: Path, tmp_path: Path, logging_steps: int
) -> None:
    out = train_here(packed, tiny_model, tmp_path, config(max_steps=4, logging_steps=logging_steps))
    expected = {2: [1, 2, 4], 3: [1, 3, 4], 100: [1, 4]}[logging_steps]
    assert [entry["optimizer_step"] for entry in read_metrics(out / "metrics.jsonl")] == expected
