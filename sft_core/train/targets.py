"""Which modules get an adapter.

In: a model and the recipe's `train.lora`. Out: full names of modules. `all-linear` is the QLoRA paper's choice (arXiv
2305.14314): every linear layer; never the output head, and never what chooses experts: a router that moves sends
tokens to experts that never learnt them.
"""

import re
from typing import Any

import torch

from sft_core.errors import RecipeError
from sft_core.recipe import LoraConfig
from sft_core.train.four_bit import is_4bit

ALL_LINEAR = "all-linear"
ROUTER_NAME = re.compile(r"(?:.*_)?(?:gate|router)")
"""Of any module on the way to a layer: Qwen's `gate` and `shared_expert_gate`, Granite's `router`."""


def adapted_modules(model: Any, lora: LoraConfig) -> list[str]:
    """Names of the modules to adapt, in the model's order. RecipeError if a target names none."""
    modules = dict(model.named_modules())
    if lora.target_modules == ALL_LINEAR:
        head = model.get_output_embeddings()
        names = [
            name
            for name, module in modules.items()
            if isinstance(module, torch.nn.Linear) and module is not head and not _routes(name, modules)
        ]
        if not names:
            raise RecipeError("train.lora.target_modules 'all-linear': the model has no linear layer; name its modules")
    else:
        names = _matching(modules, lora.target_modules)
    return [name for name in names if not is_trained_whole(name, lora.modules_to_save)]


def check_modules_to_save(model: Any, lora: LoraConfig) -> None:
    """RecipeError for a name that fits no module (PEFT would say nothing), or that names 4-bit weights."""
    modules = dict(model.named_modules())
    for target in lora.modules_to_save:
        found = [name for name in modules if is_trained_whole(name, (target,))]
        if not found:
            raise RecipeError(f"train.lora.modules_to_save: {_no_such_module(target, modules)}")
        if any(is_4bit(inner) for name in found for inner in modules[name].modules()):
            raise RecipeError(
                f"train.lora.modules_to_save: {target!r} is held in 4 bits and cannot be trained whole; set "
                "quantization: none, or adapt it (target_modules)"
            )


def fused_experts(model: Any) -> tuple[list[str], float]:
    """Names of weights with three dimensions (experts stacked in one tensor), and their fraction of all weights."""
    total, fused, names = 0, 0, []
    for name, parameter in model.named_parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 keeps the whole shape there
        total += shape.numel()
        if len(shape) == 3 and "conv" not in name:
            fused += shape.numel()
            names.append(name)
    return names, fused / max(total, 1)


def _routes(name: str, modules: dict[str, Any]) -> bool:
    parts = name.split(".")
    above = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return any(
        ROUTER_NAME.fullmatch(path.rpartition(".")[2]) or "router" in type(modules[path]).__name__.lower()
        for path in above
    )


def _matching(modules: dict[str, Any], targets: str | tuple[str, ...]) -> list[str]:
    """PEFT's rule: one text is a regular expression for whole names, several are names or their endings."""
    if isinstance(targets, str):
        names = [name for name in modules if re.fullmatch(targets, name)]
        if not names:
            raise RecipeError(f"train.lora.target_modules: {_no_such_module(targets, modules)}")
        return names
    for target in targets:
        if not any(_ends_with(name, target) for name in modules):
            raise RecipeError(f"train.lora.target_modules: {_no_such_module(target, modules)}")
    return [name for name in modules if any(_ends_with(name, target) for target in targets)]


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def is_trained_whole(name: str, targets: tuple[str, ...]) -> bool:
    return any(_ends_with(name, target) for target in targets)


def _no_such_module(target: str, modules: dict[str, Any]) -> str:
    known = sorted({name.rpartition(".")[2] for name in modules if not name.rpartition(".")[2].isdigit()} - {""})
    return f"{target!r} names no module of this model; it has {', '.join(known[:30])}"
