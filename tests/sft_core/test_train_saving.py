"""What a rank says when a checkpoint cannot be written: the disk, or the rank that is gone."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from transformers import Trainer, TrainerState

from sft_core.errors import TrainError
from sft_core.recipe import TrainConfig
from sft_core.train.arguments import training_arguments
from sft_core.train.launchers import free_port
from sft_core.train.ranks import waited_in_vain
from sft_core.train.spec import TrainSpec
from sft_core.train.trainer import PackedTrainer
from tests.sft_core.train_runs import config

LOST = (
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:35671",
    "NCCL communicator was aborted on rank 1.",
    "failed to recv, got 0 bytes: TCPStore(SocketImpl(fd=4, addr=[localhost]:40832))",
)
"""As torch says it."""


def saving(folder: Path, error: Exception, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Save checkpoint-3 while the Trainer's own saving fails so, after a first file; its folder."""

    def fail(trainer: Trainer, *_: object) -> None:
        (folder / "checkpoint-3").mkdir()
        (folder / "checkpoint-3" / "adapter_model.safetensors").write_bytes(b"half")
        raise error

    monkeypatch.setattr(Trainer, "_save_checkpoint", fail)
    trainer: Any = object.__new__(PackedTrainer)
    trainer.args, trainer.state = arguments(folder, config()), TrainerState(global_step=3)
    trainer._save_checkpoint(None, None)
    return folder / "checkpoint-3"


def arguments(folder: Path, section: TrainConfig) -> Any:
    spec = TrainSpec(
        packed="p",
        base_model="m",
        trust_remote_code=False,
        train=section.model_dump(mode="json"),
        seed=1,
        checkpoints=str(folder),
        metrics=str(folder / "metrics.jsonl"),
    )
    return training_arguments(spec, 5)


@pytest.mark.parametrize("text", LOST)
def test_a_lost_rank_is_not_called_a_full_disk(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = dist.DistBackendError(text) if text.startswith("NCCL") else RuntimeError(text)
    with pytest.raises(RuntimeError) as fault:
        saving(tmp_path, lost, monkeypatch)
    assert fault.value is lost


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        RuntimeError("PytorchStreamWriter failed writing file data/12: file write"),
    ],
)
def test_a_full_disk_is_one_error_and_leaves_no_half_checkpoint(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TrainError, match=r"checkpoint-3 could not be written \(.*GB are free there"):
        saving(tmp_path, error, monkeypatch)
    assert not (tmp_path / "checkpoint-3").exists()


def test_torchs_own_error_of_a_rank_that_nobody_answers_is_known() -> None:
    with pytest.raises(RuntimeError, match="timed out") as fault:
        dist.TCPStore("127.0.0.1", free_port(), 2, is_master=False, timeout=timedelta(seconds=1))
    assert waited_in_vain(fault.value)
    assert not waited_in_vain(RuntimeError("CUDA out of memory"))


@pytest.mark.parametrize(("key", "value"), [("adam_beta1", 0.8), ("adam_beta2", 0.95), ("adam_epsilon", 1e-6)])
def test_adamws_settings_reach_the_trainer(key: str, value: float, tmp_path: Path) -> None:
    assert getattr(arguments(tmp_path, config(**{key: value})), key) == value
