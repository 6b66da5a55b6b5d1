"""A resolved recipe as text for people."""

import yaml

from sft_core.markdown import as_block, as_text
from sft_core.recipe.sections import Recipe


def as_yaml(recipe: Recipe) -> str:
    """The whole recipe, defaults included."""
    return yaml.safe_dump(recipe.as_dict(), sort_keys=False, allow_unicode=True)


def as_markdown(recipe: Recipe) -> str:
    """The same as a fenced block."""
    return f"# {as_text(recipe.name)}\n\n{as_block(as_yaml(recipe), 'yaml')}"
