"""`resolve` for those who ask a server: the form, its API, a schedule. They read and run only
what the project's owner put there.

In: the parameters of a deployment's flow run. Out: the resolved recipe, or a RecipeError that names keys and no values.
What a recipe in the project's folder says is its owner's word; what a parameter says, a recipe from a URL, and a whole
recipe as a parameter (that of a part) is not. `sft_core.trust` decides on each file and URL; docs/security.md has them
all.
"""

import glob
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sft_core.errors import RecipeError
from sft_core.own_packages import ROOT
from sft_core.recipe.code import is_remote, refuse_brought_code
from sft_core.recipe.resolve import load_recipe, shipped_recipes, unknown_recipe, validated
from sft_core.recipe.sections import Recipe
from sft_core.recipe.training import DEEPSPEED_PRESETS
from sft_core.trust import PATHS, SCHEME, may_read, require_remote_code

RECIPES, TEMPLATES, CONFIGS = (".yaml", ".yml"), (".jinja", ".jinja2", ".j2"), (".json",)
PLAIN_NAME = re.compile(r"[\w.-]+")
ROWS = "demo/data/"
"""The shipped rows."""


def resolve_foreign(recipe: str | Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Merge and validate as `resolve` does. RecipeError where a parameter names what it must not."""
    given = overrides or {}
    if isinstance(recipe, Mapping):
        values, foreign = dict(recipe), True
    else:
        if recipe not in shipped_recipes():
            if PLAIN_NAME.fullmatch(recipe) and not recipe.endswith(RECIPES):
                raise unknown_recipe(recipe)
            _require(_is_file(recipe, RECIPES), "recipe", "a shipped name or a .yaml file")
        values, foreign = load_recipe(recipe, show_values=False), is_remote(recipe)
    resolved = validated("the recipe", values, given, show_values=False)
    if isinstance(recipe, str) and foreign:
        refuse_brought_code(values, "recipe")
    if resolved.base_model.trust_remote_code:
        require_remote_code("base_model.trust_remote_code is true")
    named = resolved.as_dict()
    for key, value, check, kind in _named(named, named if foreign else given):
        _require(check(value), key, kind)
    return resolved


def _named(resolved: Mapping[str, Any], given: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any, str]]:
    """(key, value, its check, what it may be) of all that is `given` and names a file or an address."""
    keys = {
        "store": (_is_place, "a folder"),
        "base_model.path": (_is_model, "a hub id or a folder"),
        "pack.chat_template": (_is_template, "a shipped name or a .jinja file"),
        "train.deepspeed": (_is_deepspeed, "a preset or a .json file"),
        "compute.dask": (may_read, "an address"),
    }
    for key, (check, kind) in keys.items():
        section, _, name = key.rpartition(".")
        if name in ((given.get(section) or {}) if section else given):
            value = (resolved[section] if section else resolved)[name]
            if value is not None:
                yield key, value, check, kind
    for name in ("datasets", "eval_datasets"):
        for number, source in enumerate(resolved[name] if name in given else ()):
            if source["source"] is None:
                yield f"{name}.{number}.path", source["path"], _is_rows, "a hub id or files"


def _require(allowed: bool, key: str, kind: str) -> None:
    """The same words whether or not there is such a file."""
    if not allowed:
        raise RecipeError(
            f"{key}: a run that was asked for from the server may name {kind}, and files only in the project's folder "
            f"(SFT_PROJECT_DIR of the worker; not by links or `..` out of it, not below a name that begins with a dot) "
            f"or in what {PATHS} of the worker's environment names, which is for URLs too; this is neither"
        )


def _is_file(name: str, suffixes: tuple[str, ...]) -> bool:
    return name.lower().partition("?")[0].endswith(suffixes) and may_read(name)


def _is_template(name: str) -> bool:
    from sft_core.pack import shipped_templates  # which knows recipes

    return name in shipped_templates() or (not SCHEME.match(name) and _is_file(name, TEMPLATES))


def _is_deepspeed(name: str) -> bool:
    return name in DEEPSPEED_PRESETS or (not SCHEME.match(name) and _is_file(name, CONFIGS))


def _is_place(name: str) -> bool:
    """A store: a folder below the project's, not that folder itself, whose files are none of a run's."""
    return may_read(name) and (SCHEME.match(name) is not None or Path(name).resolve() != Path.cwd().resolve())


def _is_model(name: str) -> bool:
    """A hub id is no file of this machine: the worker's own hub token decides on it."""
    local = Path(name).is_dir() or name.startswith((".", "/", "~")) or "\\" in name
    return may_read(name, hidden=True) if local or SCHEME.match(name) else True


def _is_rows(name: str) -> bool:
    if SCHEME.match(name) or "::" in name:
        return may_read(name)
    if name.startswith(ROWS) and not Path(name).exists():
        return (ROOT / ROWS).resolve() in (ROOT / name).resolve().parents
    if not glob.has_magic(name):
        return may_read(name)  # a hub id is, as a path, a name below the project's folder
    from fsspec.implementations.local import LocalFileSystem  # as fetch looks

    fixed = name[: min(name.find(mark) for mark in "*?[" if mark in name)].rpartition("/")
    folder = fixed[0] or (fixed[1] or ".")
    return may_read(folder) and all(may_read(found) for found in LocalFileSystem().glob(name))
