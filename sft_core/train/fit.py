"""Whether the recipe's adapter fits the base model, before anything is trained: the model without its numbers tells.

In: the base's folder, `train.lora`. Out: PEFT's settings, or RecipeError for a module or token that the model does not
have. Asked by the plan (and so by the dry run), and by training of the model with its numbers.
"""

from pathlib import Path
from typing import Any

from sft_core.convert.skeleton import peft_config, skeleton
from sft_core.errors import RecipeError
from sft_core.recipe import LoraConfig
from sft_core.train.targets import adapted_modules, check_modules_to_save
from sft_core.train.token_rows import token_indices


def adapter_settings(model: Any, base: Path, lora: LoraConfig, trust_remote_code: bool) -> Any:
    """PEFT's settings of the adapter for this model; `base` has its tokenizer. RecipeError if it does not fit."""
    check_modules_to_save(model, lora)
    modules = adapted_modules(model, lora)
    return peft_config(lora, modules, token_indices(model, base, lora, trust_remote_code))


def check_adapter(base: Path, lora: LoraConfig) -> None:
    """RecipeError if the adapter does not fit the model of this folder. No weight is read."""
    import torch
    from peft import get_peft_model

    model = skeleton(base, trust_remote_code=False)
    settings = adapter_settings(model, base, lora, trust_remote_code=False)
    try:
        with torch.device("meta"):
            get_peft_model(model, settings)
    except ValueError as error:
        raise not_adaptable(lora, error) from None


def not_adaptable(lora: LoraConfig, error: ValueError) -> RecipeError:
    """What PEFT says of modules that it has no adapter for."""
    return RecipeError(f"train.lora.target_modules {lora.target_modules!r}: {error}")
