"""What the recipe leaves to the run (`auto`): rows at once and recomputed layers, from the memory that is free.

In: the run's `TrainSpec`, tokens of a packed row. Out: the spec with numbers in place of `auto`, and what was chosen in
words, with its arithmetic. The rows of an optimizer step stay exactly those of the recipe, so what is learnt stays but
for rounding and the draws of dropout; the choice is no part of an artifact's address. All ranks choose alike: by the
least memory that one of them has. On a GPU a run that cannot fit is refused here, before weights are loaded.
"""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sft_core.forecast import CPU, Forecast, Forecaster, NotCountedError, Split, Trains, gpu_at_hand, size
from sft_core.recipe import TrainConfig
from sft_core.train.checkpoints import complete_checkpoints, read_mark, step_of
from sft_core.train.liger import liger_reason
from sft_core.train.spec import TrainSpec

CGROUP = Path("/sys/fs/cgroup")


def is_open(train: TrainConfig) -> bool:
    """Whether something is left to the run."""
    return "auto" in (train.per_device_train_batch_size, train.gradient_checkpointing)


def provisional(spec: TrainSpec) -> TrainSpec:
    """`spec` with the least that `auto` may become, to join the ranks with."""
    return _settled(spec, Split(spec.config.rows_at_once, spec.config.gradient_accumulation_steps, 1))


def settle(spec: TrainSpec, max_length: int, device: torch.device, ranks: int) -> tuple[TrainSpec, list[str]]:
    """Numbers in place of `auto`, and notes. RecipeError where it cannot fit into what is free on `device`."""
    train, chooses = spec.config, is_open(spec.config)
    if not chooses and device.type != "cuda":
        return spec, []
    free = free_bytes(device)
    if dist.is_initialized() and dist.get_world_size() > 1 and chooses:
        least = torch.tensor([float(free)], dtype=torch.float64, device=device)
        dist.all_reduce(least, dist.ReduceOp.MIN)
        free = float(least)
    forecaster = _forecaster(spec, max_length, device, ranks)
    try:
        chosen = forecaster.choose(free, _before(spec) if chooses else None)
    except NotCountedError as error:
        note = f"note: memory: this model cannot be counted without its numbers ({error})"
        if not chooses:
            return spec, [note]
        least_split = Split(
            train.rows_at_once, train.gradient_accumulation_steps, int(bool(train.gradient_checkpointing))
        )
        return _settled(spec, least_split), [f"{note}, so auto is {least_split}"]
    note = f"note: memory: {chosen.split}: about {chosen.arithmetic}, of {size(free)} free"
    if not chooses:
        return spec, [note]
    return _settled(spec, chosen.split), [note + _beside(forecaster, chosen, free)]


def free_bytes(device: torch.device) -> float:
    """Memory that this rank may take: what is free on its GPU; without one its share of the machine's, or of its
    container's."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text("utf-8").splitlines())
    free = float(lines["MemAvailable"].split()[0]) * 1024
    limit, used = (CGROUP / "memory.max", CGROUP / "memory.current")
    if limit.exists() and (text := limit.read_text("utf-8").strip()) != "max":
        free = min(free, float(text) - float(used.read_text("utf-8")))
    return free / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _forecaster(spec: TrainSpec, max_length: int, device: torch.device, ranks: int) -> Forecaster:
    from transformers import AutoConfig

    gpu = CPU
    if device.type == "cuda":
        gpu = gpu_at_hand(torch.cuda.get_device_name(device), torch.cuda.get_device_properties(device).total_memory)
    config = AutoConfig.from_pretrained(spec.base_model, trust_remote_code=spec.trust_remote_code)
    trains = Trains(
        config=config,
        train=spec.config,
        max_length=max_length,
        ranks=ranks,
        liger=spec.config.use_liger_kernel and not liger_reason(config.model_type, device.type),
        trust_remote_code=spec.trust_remote_code,
    )
    return Forecaster(trains, gpu)


def _before(spec: TrainSpec) -> Split | None:
    """What the newest checkpoint was trained with: bit for bit the same run goes on with that alone."""
    newest = max(complete_checkpoints(Path(spec.checkpoints)), key=step_of, default=None)
    mark = read_mark(newest) if newest is not None else None
    if mark is None or not mark.rows_at_once:
        return None
    total = spec.config.rows_at_once * spec.config.gradient_accumulation_steps
    return Split(mark.rows_at_once, total // mark.rows_at_once, mark.checkpoint_every)


def _beside(forecaster: Forecaster, chosen: Forecast, free: float) -> str:
    """What the next larger choice would have taken, and on a GPU the speeds, in words."""
    others = [forecaster.of(split) for split in forecaster.splits()]
    larger = [one for one in others if one.peak > chosen.peak]
    words = ""
    if larger:
        next_ = min(larger, key=lambda one: one.peak)
        words = f"; {next_.split} would take {size(next_.peak)}"
    if forecaster.gpu is not CPU:
        words += f"; estimated {chosen.tokens_per_second:,.0f} tokens/s a GPU"
    return words


def _settled(spec: TrainSpec, split: Split) -> TrainSpec:
    chosen: dict[str, Any] = {
        "per_device_train_batch_size": split.rows,
        "gradient_accumulation_steps": split.accumulation,
        "gradient_checkpointing": bool(split.checkpoint_every),
    }
    every = split.checkpoint_every or 1
    return replace(spec, train=spec.train | chosen, checkpoint_every=every, split_was_chosen=True)
