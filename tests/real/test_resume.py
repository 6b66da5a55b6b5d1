"""A QLoRA training of a real model under DeepSpeed that is killed goes on to the bytes of one that was not."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from sft_core.errors import TrainError
from sft_core.train import TrainInputs, train_adapter
from sft_core.train.checkpoints import newest_complete
from sft_core.train.metrics import read_metrics
from tests.real.conftest import Retrained
from tests.sft_core.train_runs import child_of, weights_hash

STEPS, SAVED, KILLED = 4, 2, 3
"""Optimizer steps; the one with a checkpoint; the one after which the process is killed."""


def test_a_killed_training_ends_with_the_same_bytes(retrained: Retrained, real_model: Path, tmp_path: Path) -> None:
    section = retrained.recipe.train
    assert (section.quantization, section.deepspeed) == ("nf4", "zero2")
    lora = section.lora.model_copy(update={"lora_dropout": 0.1})  # random numbers have to go on where they were, too
    steps = {"max_steps": STEPS, "save_steps": SAVED, "logging_steps": 1}
    section = section.model_copy(update={"lora": lora, "per_device_train_batch_size": 1, **steps})

    def train(folder: Path, on_line: Callable[[str], None]) -> Path:
        inputs = TrainInputs(
            packed=retrained.artifact("pack"), base_model=real_model, trust_remote_code=False, work=folder / "work"
        )
        train_adapter(inputs, section, 7, folder / "out", on_line)
        return folder / "out"

    def kill(line: str) -> None:
        if line.startswith(f"step {KILLED}/"):
            os.kill(child_of(os.getpid()), signal.SIGKILL)

    expected = train(tmp_path / "straight", lambda _: None)
    with pytest.raises(TrainError, match="ended with status -9"):
        train(tmp_path / "killed", kill)
    left = newest_complete(tmp_path / "killed" / "work")
    assert left is not None
    assert left.name == f"checkpoint-{SAVED}"
    lines: list[str] = []
    found = train(tmp_path / "killed", lines.append)
    assert [line.split("/")[0] for line in lines if line.startswith("step ")] == ["step 3", "step 4"]
    assert weights_hash(found) == weights_hash(expected)
    losses = [[entry["loss"] for entry in read_metrics(out / "metrics.jsonl")] for out in (found, expected)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == STEPS
