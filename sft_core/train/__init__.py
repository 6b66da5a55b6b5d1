"""Train: PackedDataset + base model -> Checkpoint.

In: a packed folder and the base model's folder. Out: `checkpoint/` (DeepSpeed's or Trainer's state of the last
optimizer step), `metrics.jsonl`, `train.log`. The work is done by a child process; see `worker.py`.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sft_core.artifacts import Outcome
from sft_core.errors import TrainError
from sft_core.recipe import BaseModelConfig, TrainConfig
from sft_core.train.checkpoints import newest_complete, step_of
from sft_core.train.launch import run_training
from sft_core.train.metrics import read_metrics
from sft_core.train.spec import TrainSpec

STEP_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainInputs:
    """What a training run reads, and the folder where it keeps resumable state."""

    packed: Path
    base_model: Path
    trust_remote_code: bool
    work: Path

    @classmethod
    def of(cls, packed: Path, base_model: Path, config: BaseModelConfig, work: Path) -> "TrainInputs":
        """From the recipe's `base_model` section."""
        return cls(packed=packed, base_model=base_model, trust_remote_code=config.trust_remote_code, work=work)


def train_adapter(
    inputs: TrainInputs, config: TrainConfig, seed: int, out: Path, on_line: Callable[[str], None] = print
) -> Outcome:
    """Train to the last optimizer step, going on from `inputs.work` if it holds a complete checkpoint."""
    work = inputs.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    num_processes = config.num_processes or _num_gpus() or 1
    spec = TrainSpec(
        packed=str(inputs.packed.resolve()),
        base_model=str(inputs.base_model),
        trust_remote_code=inputs.trust_remote_code,
        train=config.model_dump(mode="json"),
        seed=seed,
        checkpoints=str(work),
        metrics=str(work / "metrics.jsonl"),
    )
    spec.write(work / "spec.json")
    run_training(work / "spec.json", num_processes, work / "train.log", on_line)
    checkpoint = newest_complete(work)
    metrics = read_metrics(work / "metrics.jsonl")
    if checkpoint is None or not metrics:
        raise TrainError(f"the training process ended well but left no complete checkpoint in {work}")
    out.mkdir(parents=True, exist_ok=True)
    shutil.copytree(checkpoint, out / "checkpoint")
    for name in ("metrics.jsonl", "train.log"):
        shutil.copy(work / name, out / name)
    first, last = metrics[0], metrics[-1]
    seconds = (last["time"] - first["time"]) / 1000
    steps = last["optimizer_step"] - first["optimizer_step"]
    return Outcome(
        facts={
            "optimizer_steps": step_of(checkpoint),
            "first_loss": first["loss"],
            "last_loss": last["loss"],
            "seconds_per_step": seconds / steps if steps else 0.0,
            "num_processes": num_processes,
        }
    )


def _num_gpus() -> int:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([entry for entry in visible.split(",") if entry.strip() not in ("", "-1")])
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
