"""Going on with another number of ranks than wrote the checkpoint: a job restarted with fewer GPUs.

In: a complete checkpoint, the section `train`, the number of ranks. Out: the section with as many micro-batches a rank
that an optimizer step has the rows it had, so that the order of rows, the number of steps and the schedule stay; and a
folder, made by rank 0, from which any number of ranks load. Optimizer state is put together by DeepSpeed's universal
checkpoints; the Trainer's own (without DeepSpeed) is whole as it is. Random numbers (dropout) begin anew, from the seed
and the step.

Source: Universal Checkpointing, arXiv 2406.18820; `deepspeed.checkpoint.ds_to_universal`.
"""

import os
import shutil
from argparse import Namespace
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

from sft_core.errors import TrainError
from sft_core.recipe import TrainConfig
from sft_core.train.checkpoints import Mark, read_mark, step_of
from sft_core.train.zero import deepspeed_config, zero_stage

RESIZED = "resized"
"""Folder beside the checkpoints; only while a run begins from there."""
OF_EACH_RANK = ("rng_state*", "global_step*", "latest", "complete")


def going_on(checkpoint: Path, config: TrainConfig, num_processes: int) -> tuple[TrainConfig, bool]:
    """`config` for a run of `num_processes` ranks that begins at `checkpoint`, and whether that has to be resized.
    TrainError where an optimizer step's rows cannot be shared evenly, and under ZeRO-3."""
    mark = read_mark(checkpoint)
    assert mark is not None, "only complete checkpoints come here"
    sharing = num_processes // config.sequence_parallel_size
    micro_batches = mark.micro_batches or mark.world_size * config.gradient_accumulation_steps
    if config.per_device_train_batch_size == "auto":  # the recipe counts rows
        micro_batches *= mark.rows_at_once or 1
    if micro_batches % sharing:
        fits = ", ".join(str(n * config.sequence_parallel_size) for n in divisors(micro_batches))
        raise TrainError(
            f"{checkpoint} was written by {mark.world_size} ranks, {micro_batches} micro-batches an optimizer step; "
            f"{num_processes} ranks cannot share them evenly, and another number would be another run. Set "
            f"train.num_processes to one of {fits}, or delete {checkpoint.parent} to begin anew"
        )
    resizes = mark.world_size != num_processes
    if resizes and zero_stage(deepspeed_config(config)) == 3:
        raise TrainError(
            f"{checkpoint} was written by {mark.world_size} ranks, this run has {num_processes}: going on with another "
            f"number was proved under ZeRO-1 and 2, not under ZeRO-3. Set train.num_processes: {mark.world_size}, or "
            f"delete {checkpoint.parent} to begin anew"
        )
    return config.model_copy(update={"gradient_accumulation_steps": micro_batches // sharing}), resizes


def divisors(number: int) -> list[int]:
    """All of them, ascending.

    >>> divisors(12)
    [1, 2, 3, 4, 6, 12]
    """
    return [n for n in range(1, number + 1) if number % n == 0]


def note_of(checkpoint: Path, config: TrainConfig, num_processes: int) -> str:
    """What a person should know of such a start."""
    mark = read_mark(checkpoint)
    assert isinstance(mark, Mark)
    parts = "packed rows" if config.per_device_train_batch_size == "auto" else "micro-batches"
    return (
        f"note: {checkpoint.name} is of {mark.world_size} rank(s) and goes on with {num_processes}: the same rows an "
        f"optimizer step, {config.gradient_accumulation_steps} {parts} a rank; dropout draws anew"
    )


def resized(checkpoint: Path) -> Path:
    """The folder for `checkpoint`, there or not."""
    return checkpoint.parent / RESIZED / checkpoint.name


def resize(checkpoint: Path) -> None:
    """Make it: links to what all ranks share, and the optimizer's state in one piece."""
    target = resized(checkpoint)
    shutil.rmtree(target.parent, ignore_errors=True)
    shutil.copytree(checkpoint, target, copy_function=os.link, ignore=shutil.ignore_patterns(*OF_EACH_RANK))
    state = checkpoint / f"global_step{step_of(checkpoint)}"
    if not state.is_dir():
        return
    if not any(state.glob("*_optim_states.pt")):
        raise TrainError(
            f"{checkpoint} holds no optimizer state that can be shared anew (ZeRO stage 0); take the number of "
            "ranks that wrote it, or a ZeRO preset from the start"
        )
    from deepspeed.checkpoint.ds_to_universal import main

    whole = target / f"{state.name}_universal"
    options = {"input_folder": str(state), "output_folder": str(whole), "num_extract_workers": 1}
    options |= {"num_merge_workers": 1, "keep_temp_folder": False, "strict": True, "inject_missing_state": True}
    said = StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        main(Namespace(**options))
    (target / "latest_universal").write_text(whole.name, "utf-8")
