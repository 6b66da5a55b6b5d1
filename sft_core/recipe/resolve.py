"""Resolve once, at the border: a recipe by name, path or URL, plus overrides, becomes one frozen `Recipe`.

Here whoever asks is whoever started the process: any file may be named. `foreign.py` is for those who ask a server.
"""

import difflib
import os
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import fsspec
import yaml
from pydantic import BaseModel, ValidationError

from sft_core.bounds import YAML_CHARACTERS
from sft_core.errors import RecipeError
from sft_core.recipe.code import is_remote, refuse_brought_code
from sft_core.recipe.credentials import refuse_credentials
from sft_core.recipe.sections import Recipe
from sft_core.trust import trust_folder
from sft_core.yaml_text import NotYaml, UniqueKeys, read_yaml

SHOWN_CHARACTERS = 200
"""Of a value in an error."""


def resolve(recipe: str | os.PathLike[str] | Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Merge `overrides` key by key into `recipe` and validate the whole. RecipeError names every wrong key."""
    if isinstance(recipe, Mapping):
        return validated("the recipe", dict(recipe), overrides)
    values = load_recipe(recipe)
    if is_remote(str(recipe)):
        refuse_brought_code(values, str(recipe))
    elif Path(recipe).is_file():
        trust_folder(Path(recipe).parent)
    return validated(str(recipe), values, overrides)


def validated(
    where: str, values: Mapping[str, Any], overrides: Mapping[str, Any] | None, *, show_values: bool = True
) -> Recipe:
    """The recipe that `values` with `overrides` make. RecipeError names every wrong key of it, and its value."""
    merged = merge_keys(values, overrides or {})
    refuse_credentials(merged, where)
    try:
        return Recipe.model_validate(merged)
    except ValidationError as error:
        raise RecipeError(_explain(error, where, show_values)) from None


def load_recipe(recipe: str | os.PathLike[str], *, show_values: bool = True) -> dict[str, Any]:
    """Read a recipe's YAML from a shipped name, a path, or any fsspec URL. Without `show_values` no error repeats what
    is in it."""
    text = read_recipe(str(recipe))
    try:
        values = read_yaml(text, UniqueKeys)
    except yaml.YAMLError as error:
        raise RecipeError(f"{recipe}: not YAML: {error if show_values else _place(error)}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{recipe}: a recipe is a mapping of keys, this is {type(values).__name__}; see recipes/")
    strange = next((key for key in values if not isinstance(key, str)), None)
    if strange is not None:
        raise RecipeError(f"{recipe}: the key {short(strange)} is a {type(strange).__name__}, not a name; see recipes/")
    return values


def _place(error: yaml.YAMLError) -> str:
    """The error without what the text says; ours name keys alone."""
    return error.place if isinstance(error, NotYaml) else str(error)


def shipped_recipes() -> dict[str, str]:
    """Text of every recipe that comes with the project, by name."""
    files = sorted(resources.files("recipes").iterdir(), key=lambda entry: entry.name)
    return {f.name.removesuffix(".yaml"): f.read_text("utf-8") for f in files if f.name.endswith(".yaml")}


def merge_keys(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`overrides` over `values`, key by key: sections merge, everything else is replaced.

    >>> merge_keys({"train": {"seed": 1, "lora": {"r": 8}}}, {"train": {"lora": {"r": 16}}})
    {'train': {'seed': 1, 'lora': {'r': 16}}}
    """
    merged = dict(values)
    for key, value in overrides.items():
        old = merged.get(key)
        merged[key] = merge_keys(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def parse_settings(settings: Iterable[str]) -> dict[str, Any]:
    """`--set` arguments to nested overrides; values are YAML.

    >>> parse_settings(["train.learning_rate=1e-4", "train.lora.r=8"])
    {'train': {'learning_rate': 0.0001, 'lora': {'r': 8}}}
    """
    overrides: dict[str, Any] = {}
    for setting in settings:
        dotted, equals, text = setting.partition("=")
        if not equals or not dotted:
            raise RecipeError(f"--set {setting!r}: write it as section.key=value, for example train.learning_rate=1e-4")
        try:
            value: Any = _yaml_value(text)
        except yaml.YAMLError as error:
            raise RecipeError(f"--set {short(dotted)}: not YAML: {error}") from None
        for key in reversed(dotted.split(".")):
            value = {key: value}
        overrides = merge_keys(overrides, value)
    return overrides


def _yaml_value(text: str) -> object:
    value = read_yaml(text)
    if isinstance(value, str):
        try:
            return float(value)  # YAML 1.1 reads 1e-4 as text
        except ValueError:
            return value
    return value


def read_recipe(recipe: str) -> str:
    """Text of a recipe: a shipped name, a file, or any fsspec URL. RecipeError names the nearest if there is none."""
    refuse_credentials(recipe, "the recipe's own address", "recipe")
    shipped = shipped_recipes()
    if recipe in shipped:
        return shipped[recipe]
    if "://" not in recipe and not Path(recipe).is_file():
        raise unknown_recipe(recipe)
    try:
        with fsspec.open(recipe, "rt", encoding="utf-8") as file:
            return str(file.read(YAML_CHARACTERS + 1))  # one more is an error where it is parsed
    except (OSError, ValueError, ImportError) as error:
        raise RecipeError(f"{recipe}: cannot be read: {error}") from None


def unknown_recipe(recipe: str) -> RecipeError:
    """What to say of a name that is neither shipped nor a file."""
    near = difflib.get_close_matches(recipe, shipped_recipes(), n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return RecipeError(f"no recipe {recipe!r}: {hint}`sft recipes list` names those that ship; or give a file or URL")


def _explain(error: ValidationError, where: str, show_values: bool) -> str:
    lines = [_explain_one(entry, show_values) for entry in error.errors()]
    return "\n".join([f"{where}: {len(lines)} wrong key(s)" if len(lines) > 1 else f"{where}:", *lines])


def _explain_one(entry: Any, show_values: bool) -> str:
    value = f" (value {short(entry['input'])})" if show_values else ""
    location = [str(part) for part in entry["loc"]]
    dotted = ".".join(location) or "recipe"
    if entry["type"] == "extra_forbidden":
        return f"  {dotted}: unknown key{value}; {_hint(location)}"
    if entry["type"] == "missing":
        return f"  {dotted}: missing; it has no default"
    message = str(entry["msg"]).removeprefix("Value error, ")
    return f"  {dotted}: {message}{value}"


def _hint(location: list[str]) -> str:
    """What may have been meant by an unknown key: a key of that name in another place, or a like one in this place."""
    *section, name = location
    here = _keys_at(section)
    elsewhere = [place for place in ([], *([key] for key in _keys_at([]))) if _has_section(place, name)]
    if elsewhere:
        places = " or ".join(repr(".".join([*place, name])) for place in elsewhere)
        return f"did you mean {places}?"
    near = difflib.get_close_matches(name, here, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(here)}"


def _has_section(place: list[str], name: str) -> bool:
    """Whether there is a section at `place`, and `name` is a key of it."""
    return (not place or _keys_at(place) != _keys_at([])) and name in _keys_at(place)


def short(value: object) -> str:
    """The beginning of a value's repr."""
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."


def _keys_at(location: list[str]) -> list[str]:
    """Known keys of the section at `location`; list indices and union tags on the way are passed over."""
    section: type[BaseModel] = Recipe
    for part in location:
        names = {field.alias or name: field.annotation for name, field in section.model_fields.items()}
        inner = _section_in(names.get(part))
        if inner is not None:
            section = inner
    return [field.alias or name for name, field in section.model_fields.items()]


def _section_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        inner = _section_in(argument)
        if inner is not None:
            return inner
    return None
