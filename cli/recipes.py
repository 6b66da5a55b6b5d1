"""`sft recipes list|show|copy`."""

from pathlib import Path
from typing import Annotated

import typer

from sft_core.terminal import say

app = typer.Typer(no_args_is_help=True, help="The recipes that come with the project.")


@app.command("list")
def list_() -> None:
    """Names of all shipped recipes, with the first line of what each says about itself."""
    from sft_core.recipe import shipped_recipes

    for name, text in shipped_recipes().items():
        first = text.split("\n", 1)[0]
        say(f"{name:38} {first.removeprefix('# ') if first.startswith('#') else ''}".rstrip())


@app.command()
def show(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="Name, file or URL.")],
    resolved: Annotated[bool, typer.Option("--resolved", help="With all defaults filled in.")] = False,
) -> None:
    """Print a recipe as it is written, or with all defaults filled in."""
    from sft_core.recipe import read_recipe, resolve
    from sft_core.recipe.show import as_yaml

    whole = as_yaml(resolve(recipe))  # also the check that it is one
    text = whole if resolved else read_recipe(recipe)
    say(text, end="")


@app.command()
def copy(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of a shipped recipe.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="File to write.")],
) -> None:
    """Copy a shipped recipe to a file of your own, to change it."""
    from sft_core.errors import RecipeError
    from sft_core.recipe import shipped_recipes

    recipes = shipped_recipes()
    if name not in recipes:
        raise RecipeError(f"no shipped recipe {name!r}; there are: {', '.join(recipes)}")
    if out.exists():
        raise RecipeError(f"{out}: exists already; choose another file")
    out.write_text(recipes[name], "utf-8")
    say(f"{out}: edit it, then: sft run {out}")


@app.command("import")
def import_(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.py", help="XTuner config; it is read, never run.")],
    out: Annotated[Path | None, typer.Option(help="Recipe file to write; printed if not given.")] = None,
) -> None:
    """Turn an XTuner config into a recipe, and name what has no counterpart."""
    from sft_core.errors import RecipeError
    from sft_core.recipe.xtuner import import_config

    if out is not None and out.exists():
        raise RecipeError(f"{out}: exists already; choose another file")
    imported = import_config(config)
    if out is None:
        say(imported.text, end="")
        return
    try:
        out.write_text(imported.text, "utf-8")
    except OSError as error:
        raise RecipeError(f"--out {out}: cannot be written: {error.strerror}") from None
    say(f"{out}: {imported.keys} keys from {config}; {len(imported.remarks)} settings have no counterpart:")
    for remark in imported.remarks:
        say(f"  {remark.name} = {remark.value}: {remark.why}")
    if imported.skipped:
        say(f"{len(imported.skipped)} statements were not followed, only running them would tell what they do:")
    for statement in imported.skipped:
        say(f"  line {statement.line}: {statement.source}")
    say(f"Next: read {out}, then: sft explain {out}")
