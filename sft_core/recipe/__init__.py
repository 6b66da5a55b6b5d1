"""The recipe: one YAML, validated, frozen; it holds only what differs from the defaults."""

from sft_core.recipe.resolve import load_recipe, merge_keys, parse_settings, read_recipe, resolve, shipped_recipes
from sft_core.recipe.sections import (
    BaseModelConfig,
    ComputeConfig,
    DatasetConfig,
    EvaluateConfig,
    MergeConfig,
    NormalizeConfig,
    PackConfig,
    Recipe,
    RegisterConfig,
)
from sft_core.recipe.training import LoraConfig, TrainConfig

__all__ = [
    "BaseModelConfig",
    "ComputeConfig",
    "DatasetConfig",
    "EvaluateConfig",
    "LoraConfig",
    "MergeConfig",
    "NormalizeConfig",
    "PackConfig",
    "Recipe",
    "RegisterConfig",
    "TrainConfig",
    "load_recipe",
    "merge_keys",
    "parse_settings",
    "read_recipe",
    "resolve",
    "shipped_recipes",
]
