"""All weights of a fully trained model as a complete model folder, under the names of the published files.

In: tensors under the trainer's names, the base model's folder (configuration, tokenizer). Out: safetensors with index,
config, generation config, tokenizer with the chat template, model card. One weight is in memory at a time.
"""

from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from sft_core.base_check.identity import BaseIdentity
from sft_core.convert import ConvertOptions
from sft_core.convert.adapter import rounded_dtype
from sft_core.convert.skeleton import Shape, model_shapes, published, published_shapes, skeleton
from sft_core.convert.trained import Stored, TrainedTensors, all_finite
from sft_core.convert.writer import Slot, require_space, split_shards, write_index, write_tensors
from sft_core.errors import ModelError

ALL_TRAINED = "all weights were trained, nothing was merged: there is no distance to measure"
CARD = """---
{known}library_name: transformers
tags: [sft-flows, full-fine-tuning]
---

All weights trained by sft-flows, starting from the base model.

- base model: {base}
- tensors: {tensors}, {parameters:,} parameters, in {dtype}
- checkpoint: {layout}, {ranks} ranks, optimizer step {global_steps}

Not certified: {certificate[why]}.
"""


def write_model(
    trained: TrainedTensors, out: Path, tokenizer: Path | None, base: BaseIdentity, options: ConvertOptions
) -> dict[str, Any]:
    """Write the folder. ModelError unless every weight of the base's configuration is there, finite, of its shape.

    `base`: what the card says.
    """
    from sft_core.merge import MergeOptions
    from sft_core.merge.folder import write_companions

    if options.base is None:
        raise ModelError(f"{trained.source}: all weights were trained; give the folder of the base for config.json")
    model = skeleton(options.base, options.trust_remote_code)
    stored = _published(trained, model, options.base)
    if dtype := rounded_dtype(options):
        stored = {name: replace(t, dtype=dtype) if t.dtype.is_floating_point else t for name, t in stored.items()}
    out.mkdir(parents=True, exist_ok=True)
    slots = [Slot(name, tensor.dtype, tensor.shape) for name, tensor in stored.items()]
    require_space(out, slots)
    shards = split_shards(slots, options.max_shard_size)
    try:
        _write_checked(out, shards, stored, trained.source)
    except ModelError:
        for shard in shards:
            (out / shard).unlink(missing_ok=True)
        raise
    write_index(out, shards)
    written = next((slot.dtype for slot in slots if slot.dtype.is_floating_point), torch.float32)
    merge = MergeOptions(chat_template=options.chat_template, trust_remote_code=options.trust_remote_code)
    dtype_name = str(written).removeprefix("torch.")
    generation = write_companions(options.base, tokenizer, out, merge, {"dtype": dtype_name})
    facts = {
        "tensors": len(slots),
        "parameters": sum(slot.nbytes // slot.dtype.itemsize for slot in slots),
        "layout": trained.layout,
        "ranks": trained.ranks,
        "global_steps": trained.global_steps,
        "dtype": dtype_name,
        "eos_token_id": generation.get("eos_token_id"),
        "certificate": {"certified": False, "why": ALL_TRAINED},
    }
    (out / "README.md").write_text(CARD.format(known=base.metadata(), base=base.words(), **facts), "utf-8")
    return facts


def _write_checked(out: Path, shards: dict[str, list[Slot]], stored: dict[str, Stored], source: Path) -> None:
    """Write the weights, each looked at once."""
    something = False
    names = [slot.name for slots in shards.values() for slot in slots]
    for name, tensor in zip(names, write_tensors(out, shards, stored), strict=True):
        if not all_finite(tensor):
            raise ModelError(f"{source}: {name} holds NaN or infinity; take an earlier checkpoint")
        something = something or bool(tensor.any())
    if not something:
        raise ModelError(f"{source}: every weight is zero; take an earlier checkpoint")


def _published(trained: TrainedTensors, model: Any, base: Path) -> dict[str, Stored]:
    """The tensors under the names of the model's files, in its order. The checkpoint holds each under its name in the
    model, or already in the parts of the files (Mixtral's experts); a tied weight once, under its first name.
    """
    expected = model_shapes(model)
    parts = published_shapes(model, expected)
    found = _found(trained, model, base)
    in_parts = [name for name in expected if name not in found and all(part in found for part in parts[name])]
    known = {*expected, *(part for name in in_parts for part in parts[name])}
    foreign = sorted(name for name in found if name not in known and not _is_buffer(model, name))
    missing = sorted(set(expected) - set(found) - set(in_parts))
    if foreign or missing:
        what = f"{missing[0]} is missing" if missing else f"{foreign[0]} is no weight of it"
        raise ModelError(
            f"{trained.source}: {what} ({len(missing)} missing, {len(foreign)} too many of {len(expected)}) for the "
            f"base {base}; it is of another model, or the checkpoint is incomplete. An adapter needs train.lora"
        )
    read_parts = lru_cache(maxsize=1)(partial(_parts, model, found))  # one weight, cut once
    stored: dict[str, Stored] = {}
    for name, shape in expected.items():
        if name in in_parts:
            stored |= {part: _of_shape(found[part], part, each, trained, base) for part, each in parts[name].items()}
            continue
        whole = _of_shape(found[name], name, shape, trained, base)
        for part, each in parts[name].items():
            stored[part] = Stored(each, whole.dtype, partial(_part, read_parts, name, part))
    return stored


def _found(trained: TrainedTensors, model: Any, base: Path) -> dict[str, Stored]:
    """Without the trainer's prefixes; ModelError if the two names of a tied weight hold two things."""
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    found: dict[str, Stored] = {}
    for key, tensor in trained.tensors.items():
        name = key.removeprefix("module.").removeprefix("llm.")
        first = tied.get(name, name)
        if first in found and not torch.equal(found[first].read(), tensor.read()):
            raise ModelError(f"{trained.source}: {name} and {first} are tied in the base {base}, and differ here")
        found[first] = tensor
    return found


def _parts(model: Any, found: dict[str, Stored], name: str) -> dict[str, torch.Tensor]:
    return published(model, {name: found[name].read()})


def _part(read_parts: Any, name: str, part: str) -> torch.Tensor:
    tensor: torch.Tensor = read_parts(name)[part]
    return tensor


def _of_shape(tensor: Stored, name: str, shape: Shape, trained: TrainedTensors, base: Path) -> Stored:
    if tensor.shape != shape:
        raise ModelError(
            f"{trained.source}: {name} has shape {tensor.shape}, the base {base} says {shape}; it is of another model"
        )
    return tensor


def _is_buffer(model: Any, name: str) -> bool:
    """Buffers that are computed, not stored, may be in an old checkpoint; they are left out."""
    return name in {buffer for buffer, _ in model.named_buffers()} or name.endswith("rotary_emb.inv_freq")
