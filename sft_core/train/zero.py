"""DeepSpeed's configuration for a recipe. Source: https://www.deepspeed.ai/docs/config-json/ and HF's deepspeed guide.

Values marked "auto" are filled from TrainingArguments by transformers.
"""

import json
from pathlib import Path
from typing import Any

from sft_core.errors import RecipeError
from sft_core.recipe import TrainConfig

PRESETS: dict[str, dict[str, Any]] = {
    "zero1": {"stage": 1},
    "zero2": {"stage": 2, "overlap_comm": True},
    "zero3": {"stage": 3, "overlap_comm": True, "stage3_gather_16bit_weights_on_model_save": True},
}


def deepspeed_config(train: TrainConfig) -> dict[str, Any] | None:
    """The JSON that DeepSpeed gets, or None for plain Trainer checkpoints."""
    if train.deepspeed is None:
        return None
    name = train.deepspeed.removeprefix("deepspeed_")
    if name not in PRESETS:
        return _read_json(train.deepspeed)
    return {
        "zero_optimization": PRESETS[name],
        "bf16": {"enabled": train.dtype == "bfloat16"},
        "fp16": {"enabled": train.dtype == "float16", "initial_scale_power": 16},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": "auto",
        "gradient_accumulation_steps": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "steps_per_print": 1_000_000_000,
    }


def _read_json(path: str) -> dict[str, Any]:
    try:
        config = json.loads(Path(path).read_text("utf-8"))
    except FileNotFoundError:
        known = ", ".join(PRESETS)
        raise RecipeError(f"train.deepspeed {path!r}: neither a preset ({known}) nor a JSON file") from None
    except ValueError as error:
        raise RecipeError(f"train.deepspeed {path!r}: not JSON: {error}") from None
    if not isinstance(config, dict):
        raise RecipeError(f"train.deepspeed {path!r}: a DeepSpeed configuration is a JSON object")
    return config
