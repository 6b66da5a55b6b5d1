"""A resolved recipe as text for people."""

import yaml

from sft_core.recipe.sections import Recipe


def as_yaml(recipe: Recipe) -> str:
    """The whole recipe, defaults included."""
    return yaml.safe_dump(recipe.as_dict(), sort_keys=False, allow_unicode=True)


def as_markdown(recipe: Recipe) -> str:
    """The same as a fenced block."""
    return f"# {recipe.name}\n\n```yaml\n{as_yaml(recipe)}```\n"
