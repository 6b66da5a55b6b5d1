"""What a GPU holds through the whole training: weights, what is kept for each trained one, DeepSpeed's buffers.

In: a model's counts, the section `train`, the number of ranks. Out: bytes by what they hold. Read off the DeepSpeed
configuration that the run will get.

Sources: ZeRO, arXiv 1910.02054; DeepSpeed's configuration guide and `stage_1_and_2.py` (buckets, sums of gradients).
"""

from typing import Any

from sft_core.forecast.counting import NF4_BYTES
from sft_core.forecast.model import TrainedModel
from sft_core.recipe import TrainConfig
from sft_core.train.zero import deepspeed_config, zero_stage

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp32": 4, "bf16": 2, "fp16": 2}
ADAM_BYTES = 8
"""Two float32 moments."""
BUCKET_NUMBERS = 500_000_000
"""DeepSpeed's `reduce_bucket_size` where nothing is said."""
LIVE_NUMBERS = 1_000_000_000
"""DeepSpeed's `stage3_max_live_parameters` where nothing is said."""
LIBRARY_BYTES = int(0.8 * 2**30)
"""CUDA's context, cuBLAS' workspaces, NCCL."""


def kept_bytes(model: TrainedModel, train: TrainConfig, ranks: int) -> dict[str, float]:
    """By what they hold, of one rank."""
    config = deepspeed_config(train)
    stage, item = zero_stage(config), ITEM_BYTES[train.dtype]
    zero = (config or {}).get("zero_optimization", {})
    frozen = model.linear + model.other if train.lora is not None else 0
    parts: dict[str, float] = {}
    shared = ranks if stage == 3 else 1
    if train.quantization == "nf4":
        parts["4-bit weights"] = model.linear * NF4_BYTES / shared
        parts["other weights"] = model.other * item / shared
    elif frozen:
        parts["frozen weights"] = frozen * item / shared
    parts |= _trained_bytes(model.trained, train, config, ranks)
    if stage == 3:
        live = _number(zero, "stage3_max_live_parameters", LIVE_NUMBERS)
        parts["gathered weights"] = min(live, model.linear + model.other) * item
    if stage:
        bucket = _number(zero, "reduce_bucket_size", BUCKET_NUMBERS, auto=model.hidden_size**2)
        parts["DeepSpeed's buckets"] = bucket * item * (2 if zero.get("overlap_comm", stage == 3) else 1)
    return parts | {"CUDA and its libraries": LIBRARY_BYTES}


def _trained_bytes(trained: int, train: TrainConfig, config: dict[str, Any] | None, ranks: int) -> dict[str, float]:
    name = "adapter" if train.lora is not None else "weights"
    if config is None:
        return {f"{name} in float32": trained * 4, "gradients": trained * 4, "optimizer": trained * ADAM_BYTES}
    stage, item = zero_stage(config), ITEM_BYTES[train.dtype]
    summed = (config.get("data_types") or {}).get("grad_accum_dtype") or train.dtype
    offload = (config.get("zero_optimization", {}).get("offload_optimizer") or {}).get("device", "none") != "none"
    gradients = item + ITEM_BYTES[summed] / (ranks if stage >= 2 else 1)
    return {
        name: trained * item / (ranks if stage == 3 else 1),
        "gradients": trained * (item / ranks + ITEM_BYTES[summed] / ranks if stage == 3 else gradients),
        "optimizer": 0 if offload else trained * (4 + ADAM_BYTES) / (ranks if stage else 1),
    }


def _number(section: dict[str, Any], key: str, default: float, auto: float | None = None) -> float:
    value = section.get(key, default)
    return (auto if auto is not None else default) if value == "auto" else float(value)
