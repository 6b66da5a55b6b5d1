"""A PEFT folder as pairs of matrices. Source: LoRA, arXiv 2106.09685; rank-stabilised scale, arXiv 2312.03732.

In: `adapter_config.json` and `adapter_model.safetensors`. Out: for each module of the base its A, B and the scale.
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from sft_core.errors import ModelError
from sft_core.fingerprint import hash_folder, hash_value

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
UNSUPPORTED = (
    "use_dora",
    "modules_to_save",
    "fan_in_fan_out",
    "rank_pattern",
    "alpha_pattern",
    "lora_bias",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
)
"""Settings under which the update is something other than `scale * B A` on the modules named."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """`pairs`: module name -> A (r, in), B (out, r)."""

    scale: float
    pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]
    fingerprint: str
    base_name: str


def load_adapter(folder: Path) -> Adapter:
    """Read and check a PEFT folder. ModelError for anything but plain LoRA, or for a tensor that cannot be placed."""
    config = _read_config(folder)
    try:
        tensors = load_file(folder / WEIGHTS)
    except (SafetensorError, FileNotFoundError) as error:
        raise ModelError(f"{folder / WEIGHTS}: missing or torn ({error}); convert the checkpoint again") from None
    sides: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        match = KEY.fullmatch(name)
        if match is None:
            raise ModelError(
                f"{folder / WEIGHTS}: {name} is not a lora_A or lora_B weight; it would be lost in the merge"
            )
        sides.setdefault(match["module"], {})[match["side"]] = tensor
    pairs = {}
    for module, pair in sides.items():
        if set(pair) != {"A", "B"}:
            raise ModelError(f"{folder / WEIGHTS}: {module} has lora_{''.join(pair)} only; the adapter is incomplete")
        a, b = pair["A"], pair["B"]
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != config["r"] or b.shape[1] != config["r"]:
            shapes = f"A {tuple(a.shape)}, B {tuple(b.shape)}"
            raise ModelError(f"{folder / WEIGHTS}: {module}: {shapes} do not fit r = {config['r']}")
        pairs[module] = (a, b)
    if not pairs:
        raise ModelError(f"{folder / WEIGHTS}: holds no tensors")
    r, alpha = config["r"], config["lora_alpha"]
    return Adapter(
        scale=alpha / math.sqrt(r) if config.get("use_rslora") else alpha / r,
        pairs=pairs,
        fingerprint=hash_value(hash_folder(folder, (CONFIG, WEIGHTS))),
        base_name=str(config.get("base_model_name_or_path")),
    )


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        config: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read ({error}); {folder} must be a PEFT adapter folder") from None
    if config.get("peft_type") != "LORA" or not config.get("r") or not config.get("lora_alpha"):
        raise ModelError(f"{path}: peft_type is {config.get('peft_type')!r}; only LoRA with r and lora_alpha is merged")
    set_ones = [f"{key} = {config[key]!r}" for key in UNSUPPORTED if config.get(key)]
    if config.get("bias") not in (None, "none"):
        set_ones.append(f"bias = {config['bias']!r}")
    if set_ones:
        raise ModelError(f"{path}: {', '.join(set_ones)}: this version merges plain LoRA only; merge it with PEFT")
    return config
