"""An adapter that began with a part of the base (PiSSA), for the base as it was.

In: trained A and B, and the A0 and B0 they began with. The trainer's base is W - s B0 A0 (s: LoRA's scale), so the
trained model is W + s (B A - B0 A0). Out: an ordinary adapter of rank 2r for W: A over A0, B beside -B0, under the same
scale; no number is changed. Source: PEFT's `path_initial_model_for_weight_conversion`, which needs the model.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from sft_core.convert.layout import INITIAL, stored_in
from sft_core.convert.trained import Stored
from sft_core.errors import ModelError
from sft_core.recipe import LoraConfig


def begins_with_base(lora: LoraConfig) -> bool:
    """Whether training changed the base."""
    return str(lora.init_lora_weights).startswith("pissa")


def relative_to_base(
    tensors: dict[str, Stored], config: dict[str, Any], lora: LoraConfig, source: Path
) -> tuple[dict[str, Stored], dict[str, Any]]:
    """Tensors and PEFT's settings of the adapter for the published base. ModelError without the file of A0 and B0."""
    first = _read_first(source)
    pairs = {name for name in tensors if ".lora_A." in name or ".lora_B." in name}
    if pairs != set(first) or any(tensors[name].shape != first[name].shape for name in pairs):
        raise ModelError(f"{source}: {INITIAL} is of another adapter than the trained tensors; not one run")
    if all(torch.equal(tensors[name].read().float(), first[name].read()) for name in pairs):
        raise ModelError(f"{source}: A and B are those that training began with; was it trained at all?")
    joined = {name: _joined(name, tensors[name], first[name]) if name in pairs else tensors[name] for name in tensors}
    alpha = config["lora_alpha"] * (2**0.5 if lora.use_rslora else 2)  # the scale is as it was
    return joined, {**config, "r": 2 * lora.r, "lora_alpha": alpha}


def _read_first(source: Path) -> dict[str, Stored]:
    folders = (source, source.parent) if source.is_dir() else (source.parent,)  # DeepSpeed's state is one level deeper
    path = next((folder / INITIAL for folder in folders if (folder / INITIAL).is_file()), None)
    if path is None:
        raise ModelError(
            f"{source}: train.lora.init_lora_weights is pissa, and there is no {INITIAL} that says what was taken out "
            "of the base; copy the whole checkpoint"
        )
    try:
        return stored_in(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: torn or no safetensors file ({error}); take another checkpoint") from None


def _joined(name: str, trained: Stored, first: Stored) -> Stored:
    dim, sign = (0, 1) if ".lora_A." in name else (1, -1)
    shape = tuple(2 * size if axis == dim else size for axis, size in enumerate(trained.shape))
    return Stored(shape, torch.float32, partial(_read_joined, trained, first, dim, sign))


def _read_joined(trained: Stored, first: Stored, dim: int, sign: int) -> torch.Tensor:
    return torch.cat([trained.read().float(), sign * first.read()], dim=dim)
