"""The sum itself: W + scale * B A, rounded once to the dtype of W.

In: base folder, adapter, and, where the base was 4-bit in training, which weights to put through NF4 first.
Out: the weight files, and how many tensors were merged, dequantised, or left as they were.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from sft_core.errors import ModelError
from sft_core.merge.adapter import Adapter
from sft_core.merge.nf4 import round_trip
from sft_core.merge.shards import base_shards, rewrite_shards


@dataclass(slots=True)
class MergeCount:
    """Tensors of the base by what became of them. `swallowed`: the update was lost whole in rounding."""

    total: int = 0
    merged: int = 0
    swallowed: int = 0
    dequantized: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightMerger:
    """Called for each tensor of the base. The sum is made in float64, so that the order of additions cannot show."""

    adapter: Adapter
    dequantize: frozenset[str]
    compute_dtype: torch.dtype
    count: MergeCount = field(default_factory=MergeCount)

    def __call__(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The tensor that goes into the merged model."""
        self.count.total += 1
        pair = self.adapter.pairs.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        quantized = name in self.dequantize
        if pair is None and not quantized:
            return weight
        if not weight.is_floating_point() or weight.itemsize < 2:
            raise ModelError(
                f"base: {name} is stored as {weight.dtype}; take the base model that is not quantised on disk"
            )
        start = round_trip(weight, self.compute_dtype) if quantized else weight
        self.count.dequantized += quantized
        if pair is None:
            return start.to(weight.dtype)
        a, b = pair  # (r, in), (out, r)
        if (b.shape[0], a.shape[1]) != tuple(weight.shape):
            shapes = f"B A is ({b.shape[0]}, {a.shape[1]}), the weight {tuple(weight.shape)}"
            raise ModelError(f"base: {name}: {shapes}; the adapter was trained on another model")
        merged = (b.double() @ a.double()).mul_(self.adapter.scale).add_(start).to(weight.dtype)
        if not bool(torch.isfinite(merged).all()):
            raise ModelError(
                f"base: {name}: the merged weight overflows {weight.dtype}; save the base as bfloat16 or float32"
            )
        self.count.merged += 1
        self.count.swallowed += torch.equal(merged, start.to(weight.dtype))
        return merged


def merge_weights(base: Path, out: Path, merger: WeightMerger) -> None:
    """Write the merged weight files. ModelError if a module has no weight in the base, or if nothing changed."""
    names = frozenset[str]().union(*base_shards(base).values())
    for wanted, what in (
        (frozenset(f"{module}.weight" for module in merger.adapter.pairs), "adapter"),
        (merger.dequantize, "quantised model"),
    ):
        missing = sorted(wanted - names)
        if missing:
            raise ModelError(
                f"base {base}: has no {missing[0]} ({len(missing)} of {len(wanted)} weights of the {what} missing); "
                "the adapter was trained on another model, or the base stores its weights under other names"
            )
    rewrite_shards(base, out, merger)
    if merger.count.swallowed == merger.count.merged:
        raise ModelError(f"merged model equals its base {base}: no update survives rounding; was the adapter trained?")
