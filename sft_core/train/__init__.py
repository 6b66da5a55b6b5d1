"""Train: PackedDataset + base model -> Checkpoint.

In: a packed folder and the base model's folder. Out: `checkpoint/` (DeepSpeed's or Trainer's state of the last
optimizer step, or of the best by held-out loss), `metrics.jsonl`, `train.log`, and `samples.jsonl` where answers were
sampled. The work is done by a child process; see `worker.py`.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sft_core.artifacts import Outcome
from sft_core.base_check import check_folder
from sft_core.errors import TrainError
from sft_core.recipe import TrainConfig
from sft_core.terminal import say
from sft_core.train.best import best_checkpoint, best_in
from sft_core.train.checkpoints import Mark, newest_complete, read_mark, step_of
from sft_core.train.gpus import check_ranks, count_gpus
from sft_core.train.launch import run_training
from sft_core.train.launchers import ONE_MACHINE, Launch
from sft_core.train.limits import check_training
from sft_core.train.metrics import read_metrics
from sft_core.train.sound import damage, newest_sound
from sft_core.train.spec import MAPPED, SAMPLES, SILENCE_SECONDS, TrainSpec
from sft_core.train.world_size import RESIZED, going_on, note_of

STEP_VERSION = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainInputs:
    """What a training run reads, and the folder where it keeps resumable state."""

    packed: Path
    base_model: Path
    trust_remote_code: bool
    work: Path
    conversations: Path | None = None
    """What was packed, with its held-out side; a message about a row can say where the row comes from."""
    launch: Launch = ONE_MACHINE
    check: Callable[[], None] = lambda: None
    """Called every second or so; what it raises ends the training."""
    silence_seconds: float = SILENCE_SECONDS
    """After so long without a sign of life of this process, its ranks end themselves."""


def train_adapter(
    inputs: TrainInputs, config: TrainConfig, seed: int, out: Path, on_line: Callable[[str], None] = say
) -> Outcome:
    """Train to the last optimizer step, going on from `inputs.work` if it holds a complete checkpoint."""
    work = inputs.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    gpus = count_gpus()
    num_processes = config.num_processes or gpus or 1
    for note in check_training(config, num_processes, cuda=gpus > 0):
        on_line(note)
    if inputs.launch.launcher != "slurm":  # where each task is a rank, and may be shown its own GPU alone
        check_ranks(num_processes // inputs.launch.nnodes, gpus)
    newest = newest_sound(work, on_line, config.load_best_model_at_end)
    resize = False
    if newest is not None:
        config, resize = going_on(newest, config, num_processes)
        if resize:
            on_line(note_of(newest, config, num_processes))
    for note in check_folder(inputs.base_model, inputs.trust_remote_code, numbers=True):
        on_line(f"note: {note}")
    spec = _spec(inputs, config, seed, resize=resize, cuda=gpus > 0)
    (work / MAPPED).unlink(missing_ok=True)  # made anew from what was compared with its hashes
    spec.write(work / "spec.json")
    run_training(work / "spec.json", num_processes, work / "train.log", on_line, inputs.launch, inputs.check)
    shutil.rmtree(work / RESIZED, ignore_errors=True)
    last_checkpoint = newest_complete(work)
    metrics = read_metrics(work / "metrics.jsonl")
    if last_checkpoint is None or not metrics:
        raise TrainError(f"the training process ended well but left no complete checkpoint in {work}")
    best = best_in(last_checkpoint)
    checkpoint = best_checkpoint(last_checkpoint) if config.load_best_model_at_end else last_checkpoint
    copy_result(checkpoint, work, out)
    if fault := damage(out / "checkpoint"):
        raise TrainError(
            f"training is done, but {checkpoint} was damaged since ({fault}); the same command goes on from "
            "the newest checkpoint that is whole"
        )
    mark = read_mark(last_checkpoint)
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
            **(chosen_split(mark, config, num_processes) if mark is not None and mark.rows_at_once else {}),
            **({"best_optimizer_step": best.optimizer_step, "best_eval_loss": best.eval_loss} if best else {}),
        }
    )


def _spec(inputs: TrainInputs, config: TrainConfig, seed: int, *, resize: bool, cuda: bool) -> TrainSpec:
    """What the ranks are told."""
    work = inputs.work.resolve()
    return TrainSpec(
        packed=str(inputs.packed.resolve()),
        base_model=str(inputs.base_model),
        trust_remote_code=inputs.trust_remote_code,
        train=config.model_dump(mode="json"),
        seed=seed,
        checkpoints=str(work),
        metrics=str(work / "metrics.jsonl"),
        conversations=str(inputs.conversations) if inputs.conversations else None,
        resize=resize,
        silence_seconds=inputs.silence_seconds,
        cuda=cuda,
    )


def chosen_split(mark: Mark, config: TrainConfig, num_processes: int) -> dict[str, int]:
    """What the run put in place of `auto`, for the manifest."""
    sharing = num_processes // config.sequence_parallel_size
    return {
        "per_device_train_batch_size": mark.rows_at_once,
        "gradient_accumulation_steps": mark.micro_batches // sharing,
        "checkpointed_every_n_layers": mark.checkpoint_every,
    }


def copy_result(checkpoint: Path, work: Path, out: Path) -> None:
    """Make the artifact of `checkpoint` and the run's logs."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        shutil.copytree(checkpoint, out / "checkpoint")
        for name in ("metrics.jsonl", "train.log", SAMPLES):
            if (work / name).exists():
                shutil.copy(work / name, out / name)
    except OSError as error:
        raise TrainError(
            f"training is done, but {checkpoint} could not be copied to {out}: {error}; make room there, and the same "
            "command goes on from here"
        ) from None
