"""DeepSpeed's configuration for a recipe. Source: https://www.deepspeed.ai/docs/config-json/ and HF's deepspeed guide.

In: the section `train`. Out: the JSON that DeepSpeed gets, or RecipeError naming what contradicts the recipe. Values
marked "auto" are filled from TrainingArguments by transformers. Where the optimizer is offloaded, torch's own AdamW
runs on the CPU: DeepSpeedCPUAdam would have to be compiled there. Gradients of micro-batches are added up in float32:
in bf16, a sum of 16 is 0.4% off. (ZeRO-1 adds in the compute dtype: with float32 DeepSpeed takes another optimizer for
it, whose checkpoints are of another form.)
"""

import copy
import json
from pathlib import Path
from typing import Any

from sft_core.errors import RecipeError
from sft_core.recipe import TrainConfig

OFFLOAD = {"device": "cpu", "pin_memory": True}
BUCKET = {"reduce_bucket_size": "auto"}
"""Elements that ranks send at a time: the square of the hidden size, 34 MB in bf16 for 4096. DeepSpeed's own is 1 GB,
twice that where it overlaps, taken at every backward pass for the 84 MB of an 8B model's adapter."""
ZERO2 = {"stage": 2, "overlap_comm": True, **BUCKET}
ZERO3 = {"stage": 3, "overlap_comm": True, **BUCKET, "stage3_gather_16bit_weights_on_model_save": True}
PRESETS: dict[str, dict[str, Any]] = {
    "zero1": {"stage": 1},
    "zero2": ZERO2,
    "zero2_offload": {**ZERO2, "offload_optimizer": OFFLOAD},
    "zero3": ZERO3,
    "zero3_offload": {**ZERO3, "offload_optimizer": OFFLOAD, "offload_param": OFFLOAD},
}


def deepspeed_config(train: TrainConfig) -> dict[str, Any] | None:
    """The JSON that DeepSpeed gets, or None for plain Trainer checkpoints."""
    if train.deepspeed is None:
        return None
    if train.deepspeed not in PRESETS:
        config = _read_json(train.deepspeed)
        _check_against_recipe(config, train)
        return config
    preset = copy.deepcopy(PRESETS[train.deepspeed])
    return {
        "zero_optimization": preset,
        **({"data_types": {"grad_accum_dtype": "fp32"}} if preset["stage"] > 1 else {}),
        "timers": {"throughput": {"enabled": False}},  # waits for the GPU at every forward, for a figure nobody reads
        "bf16": {"enabled": train.dtype == "bfloat16"},
        "fp16": {"enabled": train.dtype == "float16", "initial_scale_power": 16},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": "auto",
        "gradient_accumulation_steps": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "steps_per_print": 1_000_000_000,
    }


def deepspeed_part(train: TrainConfig) -> str | dict[str, Any] | None:
    """What decides the weights: a preset's name, or a JSON file's content, wherever it lies."""
    if train.deepspeed is None or train.deepspeed in PRESETS:
        return train.deepspeed
    return deepspeed_config(train)


def zero_stage(config: dict[str, Any] | None) -> int:
    """ZeRO's stage, 0 without DeepSpeed."""
    return int((config or {}).get("zero_optimization", {}).get("stage", 0))


def _read_json(path: str) -> dict[str, Any]:
    try:
        config = json.loads(Path(path).read_text("utf-8"))
    except FileNotFoundError:
        known = ", ".join(PRESETS)
        raise RecipeError(f"train.deepspeed {path!r}: neither a preset ({known}) nor a JSON file") from None
    except (OSError, ValueError) as error:
        raise RecipeError(f"train.deepspeed {path!r}: not JSON: {error}") from None
    if not isinstance(config, dict):
        raise RecipeError(f"train.deepspeed {path!r}: a DeepSpeed configuration is a JSON object")
    return config


def _check_against_recipe(config: dict[str, Any], train: TrainConfig) -> None:
    """A JSON file may say "auto", nothing, or what the recipe says."""
    where = f"train.deepspeed {train.deepspeed!r}"
    for section in ("optimizer", "scheduler"):
        if section in config:
            raise RecipeError(
                f"{where}: has a section {section!r}, but the recipe's learning_rate, weight_decay and "
                "lr_scheduler_type decide; delete that section"
            )
    rows_are_chosen = train.per_device_train_batch_size == "auto"
    expected: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": train.per_device_train_batch_size,
        "gradient_accumulation_steps": "auto" if rows_are_chosen else train.gradient_accumulation_steps,
        "gradient_clipping": train.max_grad_norm,
        "bf16.enabled": train.dtype == "bfloat16",
        "fp16.enabled": train.dtype == "float16",
    }
    for key, value in expected.items():
        section, _, name = key.rpartition(".")
        found = (config.get(section) or {}).get(name) if section else config.get(name)
        if found not in (None, "auto", value):
            raise RecipeError(
                f"{where}: {key} is {found!r}, the recipe's train section means {value!r}; "
                'write "auto" there and set it in the recipe'
            )
    total = config.get("train_batch_size", "auto")
    rows = train.rows_at_once * train.gradient_accumulation_steps
    if total != "auto" and total != rows * (train.num_processes or max(1, int(total) // rows)):
        raise RecipeError(
            f"{where}: train_batch_size is {total}, the recipe makes {rows} packed rows a device and optimizer step; "
            'write "auto" there'
        )
