"""A and B that begin with a part of the base: PiSSA and LoftQ.

In: a model with a fresh adapter, the recipe's `init_lora_weights`. Out: the model with A and B set; for PiSSA also the
base changed, and a file with the first A and B.

- PiSSA (arXiv 2404.02948, by PEFT's `pissa_init`): A and B are the principal part of a weight W, which keeps the rest.
  The file is written once and read at every later start of the run, so that the base is the same to the bit; a copy is
  in each checkpoint, for another machine too. With it convert makes an adapter of rank 2r for the base as it was.
- LoftQ (arXiv 2310.08659, one iteration): A and B are the largest part of what rounding to 4 bits lost; the base stays.
  PEFT's `replace_lora_weights_loftq` runs on GPUs only and leaves out LoRA's scale, by which the correction would be
  multiplied (2 with the defaults, as wrong as none); here it is divided by it. It goes by a randomised SVD (Halko et
  al., arXiv 0909.4061): whole ones of an 8B model's 224 weights take hours on a CPU. The result is kept beside the
  checkpoints until there is one, whose A and B are taken then.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D

from sft_core.convert.layout import INITIAL
from sft_core.errors import RecipeError
from sft_core.merge.shards import base_shards
from sft_core.recipe import TrainConfig
from sft_core.train.checkpoints import complete_checkpoints
from sft_core.train.four_bit import is_4bit

LOFTQ = "loftq.safetensors"
"""Beside the checkpoints: LoftQ's A and B."""
OVERSAMPLING, ITERATIONS = 16, 16
"""Of the randomised SVD. What rounding loses has singular values that fall slowly: with these, at least 99% is taken
back of what the exact one would take back; with 4 iterations, 93% (docs/LOG.md, 2026-11-28)."""

__all__ = ["INITIAL", "initialise"]

ADAPTER = "default"
"""PEFT's name of the only adapter."""
PREFIX = "base_model.model."


def initialise(model: Any, base: Path, train: TrainConfig, work: Path | None) -> None:
    """Set A and B as `train.lora.init_lora_weights` says. `work`: folder of the run, with PiSSA's first A
    and B from its first start on."""
    assert train.lora is not None, "there is an adapter"
    start = train.lora.init_lora_weights
    if start == "loftq":
        _loftq(model, base, work)
    elif isinstance(start, str) and start.startswith("pissa"):
        _pissa(model, start, getattr(torch, train.dtype), work)
        model.peft_config[ADAPTER].init_lora_weights = start  # a checkpoint's adapter alone does not fit the base


@torch.no_grad()
def _pissa(model: Any, start: str, dtype: torch.dtype, work: Path | None) -> None:
    kept = [folder / INITIAL for folder in (*complete_checkpoints(work), work)] if work else []
    known = next((load_file(path) for path in kept if path.exists()), None)  # a checkpoint's was compared with its hash
    first: dict[str, torch.Tensor] = {}
    for name, module in _adapted(model):
        base = module.get_base_layer()
        if not isinstance(base, (torch.nn.Linear, Conv1D)):
            raise RecipeError(f"train.lora.init_lora_weights {start}: {name} is no linear layer; leave it out or true")
        if base.weight is model.get_input_embeddings().weight:
            raise RecipeError(
                f"train.lora.init_lora_weights {start}: {name} shares its weight with the embeddings, which would "
                "change too; leave it out of target_modules"
            )
        _check_rank(module, base.weight.shape, name, start)
        whole = base.weight.data.clone()
        pair = [getattr(module, f"lora_{side}")[ADAPTER].weight for side in "AB"]
        keys = [f"{name}.lora_{side}.weight" for side in "AB"]
        if known is None:
            with torch.random.fork_rng(devices=[whole.device] if whole.is_cuda else []):  # a later start draws nothing
                module.pissa_init(ADAPTER, start)
        for key, part in zip(keys, pair, strict=True):
            value = part.data if known is None else known[key].to(part.device)
            part.data = value.to(dtype).float()  # DeepSpeed rounds what it trains to `dtype` first
            first[key] = part.data
        base.weight.data = (whole.float() - module.get_delta_weight(ADAPTER).float()).to(whole.dtype)
    if kept and not kept[-1].exists() and not (dist.is_initialized() and dist.get_rank()):
        _write(kept[-1], first)


def _write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Whole or not at all."""
    part = path.with_suffix(".part")
    save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, part)
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.replace(path)


@torch.no_grad()
def _loftq(model: Any, base: Path, work: Path | None) -> None:
    if work is not None and complete_checkpoints(work):
        return  # A and B of the newest are read over whatever they are now
    kept = work / LOFTQ if work is not None else None
    known = load_file(kept) if kept is not None and kept.exists() else None
    first: dict[str, torch.Tensor] = {}
    for name, module, pair in _loftq_pairs(model, base, known):
        for side, value in zip("AB", pair, strict=True):
            weight = getattr(module, f"lora_{side}")[ADAPTER].weight
            weight.data = first[f"{name}.lora_{side}.weight"] = value.to(weight.device).contiguous()
    if kept is not None and known is None and not (dist.is_initialized() and dist.get_rank()):
        _write(kept, first)


def _loftq_pairs(
    model: Any, base: Path, known: dict[str, torch.Tensor] | None
) -> Iterator[tuple[str, Any, tuple[torch.Tensor, torch.Tensor]]]:
    """Adapted 4-bit layers with their A (rank, in) and B (out, rank), made now or `known`."""
    from bitsandbytes.functional import dequantize_4bit  # slow to import; here it is loaded

    places = {name: place for shard in base_shards(base).values() for name, place in shard.items()}
    for name, module in _adapted(model):
        layer = module.get_base_layer()
        if not is_4bit(layer):
            continue
        if known is not None:
            yield name, module, (known[f"{name}.lora_A.weight"], known[f"{name}.lora_B.weight"])
            continue
        key = f"{name.removeprefix(PREFIX)}.weight"
        if key not in places:
            raise RecipeError(
                f"train.lora.init_lora_weights loftq: the base's files hold no {key} to compare with its 4-bit form; "
                "take true"
            )
        rounded = dequantize_4bit(layer.weight.data, layer.weight.quant_state)  # (out, in)
        lost = places[key].read().to(rounded.device).float() - rounded.float()
        _check_rank(module, lost.shape, name, "loftq")
        rank = module.r[ADAPTER]
        left, sizes, right = largest_part(lost, rank)
        roots = (sizes / module.scaling[ADAPTER]).sqrt()
        yield name, module, (roots[:, None] * right, left * roots)


def largest_part(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U (n, rank), S (rank,) and V (rank, m) of the largest part of `matrix` (n, m), nearly: by a randomised SVD, drawn
    from a seed of its own, so that every rank and every start finds the same."""
    sampled = min(rank + OVERSAMPLING, *matrix.shape)
    with torch.random.fork_rng(devices=[matrix.device] if matrix.is_cuda else []):
        torch.manual_seed(0)
        left, sizes, right = torch.svd_lowrank(matrix, q=sampled, niter=ITERATIONS)
    return left[:, :rank], sizes[:rank], right[:, :rank].T


def _adapted(model: Any) -> Iterator[tuple[str, Any]]:
    """Adapted modules under PEFT's names."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))


def _check_rank(module: Any, shape: torch.Size, name: str, start: str) -> None:
    if module.r[ADAPTER] > min(shape):
        raise RecipeError(
            f"train.lora.r {module.r[ADAPTER]} with init_lora_weights {start}: {name} is {tuple(shape)}, which has no "
            f"more than {min(shape)} directions"
        )
