"""`sft`: the commands, and the one place that turns a user's fault into one line and exit status 1."""

import os
import sys

import typer

from cli import convert, data, models, recipes, run, stopped, store, up
from cli.chat import chat
from cli.deploy import deploy
from cli.environment import DEBUG, debugging, quiet_libraries, set_defaults
from sft_core.disk_faults import disk_fault
from sft_core.errors import SftError
from sft_core.memory_faults import ADVICE, memory_fault
from sft_core.panics import panics_told
from sft_core.terminal import guard, safe_error, say

app = typer.Typer(
    name="sft",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Retrain chat models: fetch, normalize, pack, train, convert, merge, evaluate, register.\n\n"
    "Start with [bold]sft recipes list[/bold], then [bold]sft run RECIPE[/bold]. "
    "[bold]--debug[/bold] anywhere shows the traceback of an error.",
)
app.command()(run.run)
app.command()(run.train)
app.command()(run.explain)
app.command()(chat)
app.command()(up.up)
app.command()(deploy)
app.add_typer(convert.app, name="convert")
app.add_typer(data.app, name="data")
app.add_typer(models.app, name="models")
app.add_typer(recipes.app, name="recipes")
app.add_typer(store.app, name="store")


def main() -> None:
    """Entry point. Exit status 0 only on success; 130, 143, 129 when stopped by Ctrl-C, SIGTERM, a closed terminal."""
    if "--debug" in sys.argv:
        os.environ[DEBUG] = "1"
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    set_defaults()
    if not debugging():
        quiet_libraries()
    guard()
    stopped.begin()
    try:
        with panics_told("a model's files"), stopped.telling(str):
            app()
    except Exception as error:
        words = str(error) if isinstance(error, SftError) else disk_fault(error)
        if words is None and (full := memory_fault(error)) is not None:
            words = f"{full}; {ADVICE}"
        if debugging() or words is None:
            raise
        say(f"error: {safe_error(words)}", to_stderr=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
