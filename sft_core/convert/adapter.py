"""The trained tensors as a PEFT folder: complete or refused.

In: tensors under the trainer's names. Out: `adapter_model.safetensors` and `adapter_config.json` under PEFT's, equal
bytes for equal tensors.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch

from sft_core.convert import ConvertOptions
from sft_core.convert.layout import CONFIG, WEIGHTS
from sft_core.convert.skeleton import Shape, adapter_shapes, peft_config, short_names
from sft_core.convert.trained import Stored, TrainedTensors, all_finite, same_bits
from sft_core.convert.writer import Slot, write_tensors
from sft_core.errors import ModelError
from sft_core.recipe import LoraConfig

PREFIX = "base_model.model."
QUANTIZATION = "quantization.json"
ROWS = re.compile(r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta")
"""Single rows of an embedding (`train.lora.trainable_tokens`)."""
PART = re.compile(r"(?P<module>.+)\.lora_(?:(?P<side>[AB])\.weight|embedding_(?P<table>[AB])|magnitude_vector)")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def rounded_dtype(options: ConvertOptions) -> torch.dtype | None:
    """The dtype asked for; None to keep each tensor's own."""
    if options.dtype is not None and options.dtype not in DTYPES:
        raise ModelError(f"dtype {options.dtype!r}: must be one of {', '.join(DTYPES)}")
    return DTYPES[options.dtype] if options.dtype else None


def checked_tensors(
    trained: TrainedTensors, lora: LoraConfig, options: ConvertOptions
) -> tuple[dict[str, Stored], dict[str, Any]]:
    """Tensors under PEFT's names, and PEFT's settings. Where the base is known, they must be those that PEFT makes for
    it; elsewhere every A must have its B of rank r.
    """
    tensors: dict[str, Stored] = {}
    for key, tensor in trained.tensors.items():
        name = _peft_name(key, lora)
        if name in tensors:
            raise ModelError(f"{trained.source}: {key} and another tensor are both {name}")
        tensors[name] = tensor
    if not tensors:
        raise ModelError(f"{trained.source}: holds no adapter tensors")
    _check_pairs(tensors, lora, trained.source)
    for saved in lora.modules_to_save:
        if not any(_is_of(name, saved) for name in tensors):
            raise ModelError(f"{trained.source}: train.lora.modules_to_save names {saved}, which is not in it")
    if options.base is None and lora.trainable_tokens:
        raise ModelError("train.lora.trainable_tokens: which rows these are is known by the base alone; give it")
    if options.base is None:
        config = peft_config(lora, [match["module"] for name in tensors if (match := PART.fullmatch(name))])
        config.target_modules = short_names(config.target_modules)
    else:
        expected, config = adapter_shapes(options.base, lora, options.trust_remote_code)
        _drop_tied_rows(tensors, expected)
        _check_against(tensors, expected, trained, options.base)
    return tensors, config.to_dict()


def write_adapter(
    tensors: dict[str, Stored], trained: TrainedTensors, out: Path, config: dict[str, Any], options: ConvertOptions
) -> dict[str, Any]:
    """Write the folder and look at every number once: all finite, B not all zero. Small figures worth showing."""
    dtype = rounded_dtype(options)
    slots = [Slot(name, dtype or tensors[name].dtype, tensors[name].shape) for name in sorted(tensors)]
    squares = 0.0
    try:
        for slot, tensor in zip(slots, write_tensors(out, {WEIGHTS: slots}, tensors), strict=True):
            if not all_finite(tensor):
                raise ModelError(f"{trained.source}: {slot.name} holds NaN or infinity; take an earlier checkpoint")
            if _side(slot.name) == "B":
                rows = torch.linalg.vector_norm(tensor.float(), dim=1)  # in fp32, a short sum each
                squares += float(torch.linalg.vector_norm(rows, dtype=torch.float64)) ** 2
        if squares == 0:
            raise ModelError(
                f"{trained.source}: every lora_B is zero, so the adapter changes nothing; was it trained at all?"
            )
    except ModelError:
        (out / WEIGHTS).unlink()
        raise
    _write_json(out / CONFIG, config)
    if options.quantization is not None:
        _write_json(out / QUANTIZATION, options.quantization)
    return {
        "tensors": len(tensors),
        "parameters": sum(slot.nbytes // slot.dtype.itemsize for slot in slots),
        "norm_b": squares**0.5,
        "checked_against_base": options.base is not None,
        "layout": trained.layout,
        "ranks": trained.ranks,
        "global_steps": trained.global_steps,
    }


def _peft_name(key: str, lora: LoraConfig) -> str:
    """`llm.base_model.model.X.lora_A.default.weight` -> `base_model.model.X.lora_A.weight`, and the like."""
    name = key.removeprefix("module.").removeprefix("llm.")
    name = re.sub(r"\.lora_magnitude_vector\.default(?:\.weight)?$", ".lora_magnitude_vector", name)
    name = re.sub(r"\.(lora_embedding_[AB])\.default$", r".\1", name)
    name = name.replace(".modules_to_save.default.", ".").replace(".default.", ".")
    if lora.trainable_tokens:
        name = re.sub(r"\.trainable_tokens_delta\.default$", ".trainable_tokens_delta", name)
    known = PART.fullmatch(name) or (lora.trainable_tokens and ROWS.fullmatch(name))
    if not name.startswith(PREFIX) or not (known or any(_is_of(name, m) for m in lora.modules_to_save)):
        raise ModelError(
            f"{key}: not a lora_A or lora_B weight, nor of a module that train.lora.modules_to_save names. If all "
            "weights were trained, set train.lora to null; biases and image models are not converted"
        )
    return name


def _is_of(name: str, module: str) -> bool:
    """True if the tensor is a parameter of a module of this name: `...lm_head.weight` of `lm_head`."""
    return not PART.fullmatch(name) and name.rpartition(".")[0].endswith(module)  # PEFT's rule


def _check_pairs(tensors: dict[str, Stored], lora: LoraConfig, source: Path) -> None:
    for name, tensor in tensors.items():
        match = PART.fullmatch(name)
        if match is None:
            continue
        module, side = match["module"], _side(name)
        if not side:
            continue
        form = "{}.lora_embedding_{}" if match["table"] else "{}.lora_{}.weight"
        wanted = [form.format(module, "B" if side == "A" else "A")]
        if lora.use_dora:
            wanted.append(f"{module}.lora_magnitude_vector")
        elif f"{module}.lora_magnitude_vector" in tensors:
            raise ModelError(f"{source}: {module} has a DoRA magnitude, and train.lora.use_dora is false; not one run")
        for other in wanted:
            if other not in tensors:
                raise ModelError(f"{source}: {name} is there, {other} is missing; the checkpoint is incomplete")
        rank = tensor.shape[0 if side == "A" else -1] if len(tensor.shape) == 2 else None
        if rank != lora.r:
            raise ModelError(
                f"{source}: {name} has shape {tuple(tensor.shape)}, which is not of rank train.lora.r = {lora.r}"
            )


def _drop_tied_rows(tensors: dict[str, Stored], expected: dict[str, Shape]) -> None:
    """Rows of a tied head are the embedding's, and some trainers keep them under both names."""
    first = next((tensors[name] for name in tensors if ROWS.fullmatch(name) and name in expected), None)
    for name in [name for name in tensors if ROWS.fullmatch(name) and name not in expected]:
        if first is not None and first.shape == tensors[name].shape and same_bits(first.read(), tensors[name].read()):
            del tensors[name]


def _check_against(tensors: dict[str, Stored], expected: dict[str, Shape], trained: TrainedTensors, base: Path) -> None:
    """Names and shapes must be those that PEFT gives an adapter of these settings on this base."""
    missing, foreign = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    if missing or foreign:
        what = f"{missing[0]} is missing" if missing else f"{foreign[0]} fits no target module"
        raise ModelError(
            f"{trained.source}: {what} ({len(missing)} missing, {len(foreign)} too many of {len(expected)}), by the "
            f"recipe's train.lora on the base {base}; the recipe or the base is of another run, or the checkpoint torn"
        )
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise ModelError(
                f"{trained.source}: {name} has shape {tensors[name].shape}, on the base {base} it is {shape}; the "
                "adapter was trained on another model"
            )


def _side(name: str) -> str:
    match = PART.fullmatch(name)
    return (match["side"] or match["table"] or "") if match else ""


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, default=sorted) + "\n", "utf-8")
