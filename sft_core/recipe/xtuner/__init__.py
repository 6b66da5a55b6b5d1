"""A recipe from an XTuner config (0.1.x, 0.2.0): its literals are read, nothing of it is run or imported.

In: a config file, as written or as XTuner dumps it to its work directory. Out: `Imported`: YAML text that resolves,
with a comment behind each key, and a list of what has no counterpart.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from sft_core.errors import RecipeError
from sft_core.recipe import Recipe
from sft_core.recipe.resolve import resolve
from sft_core.recipe.xtuner.config import Remark, read_config
from sft_core.recipe.xtuner.data import read_data
from sft_core.recipe.xtuner.literals import Skipped
from sft_core.recipe.xtuner.model import read_model
from sft_core.recipe.xtuner.reasons import remark_on_the_rest
from sft_core.recipe.xtuner.text import as_text
from sft_core.recipe.xtuner.training import read_training
from sft_core.yaml_text import read_yaml


@dataclass(frozen=True, slots=True)
class Imported:
    """The recipe's text, the recipe it resolves to, how many keys came over, what has no counterpart, and which
    statements were not followed."""

    text: str
    recipe: Recipe
    keys: int
    remarks: tuple[Remark, ...]
    skipped: tuple[Skipped, ...]


def import_config(file: Path) -> Imported:
    """Turn an XTuner config into a recipe. RecipeError if it is none, is not about texts, or lacks model or data."""
    config = read_config(file)
    read_model(config)
    read_data(config)
    read_training(config)
    remark_on_the_rest(config)
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", file.stem).strip("-._") or "imported"
    text = as_text(config, name)
    try:
        recipe = resolve(read_yaml(text))
    except (RecipeError, yaml.YAMLError) as error:
        raise RecipeError(f"{file}: its values make no recipe: {error}") from None
    return Imported(text, recipe, len(config.lines), tuple(config.remarks), tuple(config.skipped))
