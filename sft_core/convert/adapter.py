"""The trained tensors as a PEFT folder: complete or refused.

In: tensors under the trainer's names. Out: `adapter_model.safetensors` and `adapter_config.json` under PEFT's, equal
bytes for equal tensors.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from sft_core.convert.layout import CONFIG, WEIGHTS
from sft_core.convert.zero import TrainedTensors
from sft_core.errors import ModelError
from sft_core.recipe import LoraConfig

PREFIX = "base_model.model."
LORA_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def adapter_tensors(trained: TrainedTensors, lora: LoraConfig, dtype: str | None) -> dict[str, torch.Tensor]:
    """Tensors under PEFT's names, checked: pairs of rank r, all finite, not all without effect."""
    if dtype is not None and dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r}: must be one of {', '.join(DTYPES)}")
    tensors: dict[str, torch.Tensor] = {}
    for key, tensor in trained.tensors.items():
        name = _peft_name(key)
        if name in tensors:
            raise ModelError(f"{trained.source}: {key} and another tensor are both {name}")
        tensors[name] = tensor if dtype is None else tensor.to(DTYPES[dtype])
    _check_pairs(tensors, lora.r, trained.source)
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"{trained.source}: {name} holds NaN or infinity; take an earlier checkpoint")
    if not any(bool(tensor.any()) for name, tensor in tensors.items() if _side(name) == "B"):
        raise ModelError(
            f"{trained.source}: every lora_B is zero, so the adapter changes nothing; was it trained at all?"
        )
    return tensors


def write_adapter(tensors: dict[str, torch.Tensor], out: Path, lora: LoraConfig, base_model: str) -> None:
    """Both files of a PEFT folder."""
    from peft import LoraConfig as PeftLoraConfig

    whole = {name: tensors[name].clone(memory_format=torch.contiguous_format) for name in sorted(tensors)}
    save_file(whole, out / WEIGHTS, metadata={"format": "pt"})
    config: dict[str, Any] = PeftLoraConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        bias="none",
        task_type="CAUSAL_LM",
        inference_mode=True,
        base_model_name_or_path=base_model,
    ).to_dict()
    config["target_modules"] = sorted({_suffix(_module(name)) for name in tensors})
    (out / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")


def adapter_facts(tensors: dict[str, torch.Tensor], trained: TrainedTensors) -> dict[str, Any]:
    """Small figures worth showing."""
    squares = [float(tensor.double().square().sum()) for name, tensor in tensors.items() if _side(name) == "B"]
    return {
        "tensors": len(tensors),
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "norm_b": sum(squares) ** 0.5,
        "layout": trained.layout,
        "ranks": trained.ranks,
        "global_steps": trained.global_steps,
    }


def _peft_name(key: str) -> str:
    """`llm.base_model.model.X.lora_A.default.weight` -> `base_model.model.X.lora_A.weight`."""
    name = key.removeprefix("module.").removeprefix("llm.").replace(".default.", ".")
    if not name.startswith(PREFIX) or not LORA_KEY.fullmatch(name):
        raise ModelError(
            f"{key}: not a lora_A or lora_B weight of a language model; fully trained modules, embeddings' LoRA and "
            "image models are not converted by this version"
        )
    return name


def _check_pairs(tensors: dict[str, torch.Tensor], r: int, source: Path) -> None:
    if not tensors:
        raise ModelError(f"{source}: holds no adapter tensors")
    for name, tensor in tensors.items():
        side = _side(name)
        other = f"{_module(name)}.lora_{'B' if side == 'A' else 'A'}.weight"
        if other not in tensors:
            raise ModelError(f"{source}: {name} is there, {other} is missing; the checkpoint is incomplete")
        rank = tensor.shape[0 if side == "A" else -1] if tensor.dim() == 2 else None
        if rank != r:
            raise ModelError(
                f"{source}: {name} has shape {tuple(tensor.shape)}, which is not of rank train.lora.r = {r}"
            )


def _module(name: str) -> str:
    return name.rpartition(".lora_")[0]


def _side(name: str) -> str:
    return name[-len("A.weight")]


def _suffix(module: str) -> str:
    """The module's own name; a numbered one (`mlp.0`) keeps its parent's, as PEFT matches by suffix."""
    parts = module.split(".")
    first = len(parts) - 1
    while parts[first].isdigit() and first > 0:
        first -= 1
    return ".".join(parts[first:])
