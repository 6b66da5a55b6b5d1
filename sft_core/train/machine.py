"""What a rank asks of the machine it trains on: exact positions, the same bits each time, and enough memory.

In: the model as it will be trained, the section `train`. Out: TrainError or MemoryFault that says what and what to do.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from sft_core.errors import TrainError
from sft_core.memory_faults import naming_memory_faults
from sft_core.recipe import TrainConfig

HALF = (torch.bfloat16, torch.float16)
ONLY_SOMETIMES = "does not have a deterministic implementation"
"""torch's words for an operation that `use_deterministic_algorithms` refuses."""


def check_rotary(model: Any) -> None:
    """TrainError if frequencies of rotary positions are held in 16 bits: with a base of 500,000, angles are 1.8 rad off
    at position 1,024. DeepSpeed before 0.19.8 cast them with the weights; merged models are scored with exact ones."""
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq") and buffer.dtype in HALF:
            raise TrainError(
                f"{name} is held in {str(buffer.dtype).removeprefix('torch.')}: positions beyond a few hundred are "
                "wrong in training and right in use. Update DeepSpeed (0.19.8 or later keeps it in float32), or set "
                "train.deepspeed to zero2 or null"
            )


def restore_rotary(model: Any) -> None:
    """Make the frequencies of rotary positions anew, in float32. ZeRO-3 builds a model in its compute dtype, and so
    rounds what its constructors compute (`zero.Init` of DeepSpeed 0.19.8 wraps `torch.arange`). Where a module cannot
    be made from its configuration alone, `check_rotary` speaks."""
    for module in model.modules():
        halves = {
            name
            for name, buffer in module.named_buffers(recurse=False)
            if name.endswith("inv_freq") and buffer.dtype in HALF
        }
        if halves and hasattr(module, "config"):
            try:
                exact = type(module)(module.config)
            except TypeError:
                continue
            for name in halves:
                setattr(module, name, getattr(exact, name).to(getattr(module, name).device))


def be_deterministic() -> None:
    """From here on torch takes slower algorithms that give the same bits each time, or raises. Not by warnings alone:
    flash attention's backward pass goes by atomics then. Source: torch's notes on reproducibility."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("FLASH_ATTENTION_DETERMINISTIC", "1")  # transformers', for the package flash-attn
    torch.use_deterministic_algorithms(True)
    # By default memory is filled that is written anyway.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


@contextmanager
def naming_limits(train: TrainConfig, max_length: int) -> Iterator[None]:
    """MemoryFault where memory runs out in training, TrainError where `deterministic` cannot be kept. `max_length`: of
    a packed row, in tokens."""
    rows = train.per_device_train_batch_size
    what = f"training on {rows} packed row(s) of up to {max_length} tokens at a time"
    lower = ["pack.max_length"]
    if train.gradient_checkpointing is not True:
        lower.insert(0, "set train.gradient_checkpointing: true")
    if rows != 1:
        lower.insert(0, "lower train.per_device_train_batch_size (and raise gradient_accumulation_steps by as much)")
    advice = f"{', or '.join(lower[:-1])}{', or ' if lower[1:] else ''}lower {lower[-1]}"
    try:
        with naming_memory_faults(what, advice):
            yield
    except RuntimeError as error:
        if ONLY_SOMETIMES not in str(error):
            raise
        raise TrainError(
            f"train.deterministic: {str(error).partition('.')[0]} on this device; set train.deterministic: false"
        ) from error
