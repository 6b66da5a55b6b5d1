"""All weights of a fully trained model as a complete model folder, under the names of the published files.

In: tensors under the trainer's names, the base model's folder (configuration, tokenizer). Out: safetensors with index,
config, generation config, tokenizer with the chat template. One weight is in memory at a time.
"""

from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from sft_core.convert import ConvertOptions
from sft_core.convert.adapter import DTYPES
from sft_core.convert.skeleton import Shape, model_shapes, published, published_shapes, skeleton
from sft_core.convert.trained import Stored, TrainedTensors
from sft_core.convert.writer import Slot, split_shards, write_index, write_tensors
from sft_core.errors import ModelError


def write_model(trained: TrainedTensors, out: Path, tokenizer: Path | None, options: ConvertOptions) -> dict[str, Any]:
    """Write the folder. ModelError unless every weight of the base's configuration is there, finite, of its shape."""
    from sft_core.merge import MergeOptions
    from sft_core.merge.folder import write_companions

    if options.base is None:
        raise ModelError(f"{trained.source}: all weights were trained; give the folder of the base for config.json")
    model = skeleton(options.base, options.trust_remote_code)
    tensors = _checked(trained, model, options.base)
    read_parts = lru_cache(maxsize=1)(partial(_parts, model, tensors))
    stored: dict[str, Stored] = {}
    dtype = DTYPES.get(options.dtype or "")
    for name, parts in published_shapes(model, {name: tensor.shape for name, tensor in tensors.items()}).items():
        for part, shape in parts.items():
            kept = dtype if dtype and tensors[name].dtype.is_floating_point else tensors[name].dtype
            stored[part] = Stored(shape, kept, partial(_part, read_parts, name, part))
    out.mkdir(parents=True, exist_ok=True)
    slots = [Slot(name, tensor.dtype, tensor.shape) for name, tensor in stored.items()]
    shards = split_shards(slots, options.max_shard_size)
    something = False
    for slot, tensor in zip(slots, write_tensors(out, shards, stored), strict=True):
        if not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"{trained.source}: {slot.name} holds NaN or infinity; take an earlier checkpoint")
        something = something or bool(tensor.any())
    if not something:
        raise ModelError(f"{trained.source}: every weight is zero; take an earlier checkpoint")
    write_index(out, shards)
    written = next((slot.dtype for slot in slots if slot.dtype.is_floating_point), torch.float32)
    merge = MergeOptions(chat_template=options.chat_template, trust_remote_code=options.trust_remote_code)
    write_companions(options.base, tokenizer, out, merge, {"dtype": str(written).removeprefix("torch.")})
    return {
        "tensors": len(slots),
        "parameters": sum(slot.nbytes // slot.dtype.itemsize for slot in slots),
        "layout": trained.layout,
        "ranks": trained.ranks,
        "global_steps": trained.global_steps,
    }


def _parts(model: Any, tensors: dict[str, Stored], name: str) -> dict[str, torch.Tensor]:
    return published(model, {name: tensors[name].read()})


def _part(read_parts: Any, name: str, part: str) -> torch.Tensor:
    tensor: torch.Tensor = read_parts(name)[part]
    return tensor


def _checked(trained: TrainedTensors, model: Any, base: Path) -> dict[str, Stored]:
    """The tensors under the model's own names, in its order; a tied weight once, under its first name."""
    expected = model_shapes(model)
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    found: dict[str, Stored] = {}
    for key, tensor in trained.tensors.items():
        name = key.removeprefix("module.").removeprefix("llm.")
        first = tied.get(name, name)
        if first in found and not torch.equal(found[first].read(), tensor.read()):
            raise ModelError(f"{trained.source}: {name} and {first} are tied in the base {base}, and differ here")
        found[first] = tensor
    foreign = sorted(name for name in found if name not in expected and not _is_buffer(model, name))
    missing = sorted(set(expected) - set(found))
    if foreign or missing:
        what = f"{missing[0]} is missing" if missing else f"{foreign[0]} is no weight of it"
        raise ModelError(
            f"{trained.source}: {what} ({len(missing)} missing, {len(foreign)} too many of {len(expected)}) for the "
            f"base {base}; it is of another model, or the checkpoint is incomplete. An adapter needs train.lora"
        )
    return {name: _of_shape(found[name], name, shape, trained, base) for name, shape in expected.items()}


def _of_shape(tensor: Stored, name: str, shape: Shape, trained: TrainedTensors, base: Path) -> Stored:
    if tensor.shape != shape:
        raise ModelError(
            f"{trained.source}: {name} has shape {tensor.shape}, the base {base} says {shape}; it is of another model"
        )
    return tensor


def _is_buffer(model: Any, name: str) -> bool:
    """Buffers that are computed, not stored, may be in an old checkpoint; they are left out."""
    return name in {buffer for buffer, _ in model.named_buffers()} or name.endswith("rotary_emb.inv_freq")
