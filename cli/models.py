"""`sft models`: registered versions. What there is, where it comes from, which one consumers load."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from sft_core.terminal import say

if TYPE_CHECKING:
    from sft_core.lineage import Recorded
    from tasks.registry import RegisteredVersion

app = typer.Typer(
    no_args_is_help=True, help="Registered models: list, promote, reject, roll back, trace, compare, reproduce."
)
Reference = Annotated[str, typer.Argument(metavar="MODEL", help="NAME (its champion), NAME@ALIAS or NAME/VERSION.")]
ModelName = Annotated[str, typer.Argument(metavar="NAME", help="Name in the registry.")]
Reason = Annotated[str, typer.Option(help="Why; kept in the registry.")]


@app.command("list")
def list_(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="One model; all by default.")] = None,
) -> None:
    """Show versions, aliases, verdicts, and how the champion changed."""
    from cli.console import SafeConsole
    from cli.models_text import versions_table
    from tasks.registry import model_names, read_history, read_versions

    console = SafeConsole()
    for model_name in [name] if name is not None else model_names():
        versions = read_versions(model_name)
        if not versions:
            _refuse(f"no version of {model_name!r} in the registry; `sft models list` shows the names")
        console.print(versions_table(model_name, versions))
        for time, words in read_history(model_name):
            console.print(f"  {time[:19]}Z  {words}", highlight=False, markup=False, soft_wrap=True)


@app.command()
def promote(
    name: ModelName,
    version: Annotated[str, typer.Argument(metavar="VERSION", help="Number or alias.")],
    reason: Reason,
    override_gate: Annotated[bool, typer.Option(help="Promote what the gate did not.")] = False,
) -> None:
    """Make a version the champion, after loading it. The gate's verdict on it must still hold."""
    from tasks.models import promote

    moved = promote(name, version, reason, override_gate=override_gate)
    say(f"{name}: champion {moved.before or 'none'} -> {moved.after}")


@app.command()
def reject(
    name: ModelName,
    version: Annotated[str, typer.Argument(metavar="VERSION", help="Number or alias.")],
    reason: Reason,
) -> None:
    """Bar a version that is not the champion from becoming it, such as one that waits for approval."""
    from tasks.models import reject

    say(f"{name}: version {reject(name, version, reason)} is barred")


@app.command()
def rollback(
    name: ModelName,
    reason: Reason,
    to: Annotated[str | None, typer.Option(help="Version to go back to; the previous champion by default.")] = None,
) -> None:
    """Give consumers the previous champion again, after loading it, and bar the present one from coming back."""
    from tasks.models import rollback

    moved = rollback(name, reason, to)
    say(f"{name}: champion {moved.before} -> {moved.after}; version {moved.before} is barred")


@app.command()
def lineage(model: Reference) -> None:
    """Show what a version was made of, back to the raw rows. Read from MLflow alone.

    Example: sft models lineage demo@champion
    """
    from cli.console import SafeConsole
    from cli.models_text import lineage_lines
    from sft_core.lineage import walk_ancestry

    name, version, recorded = _recorded(model)
    links = walk_ancestry(recorded.manifests, version.merged_fingerprint)
    for line in lineage_lines(name, version, recorded, links):
        SafeConsole().print(line, highlight=False, markup=False, soft_wrap=True)
    if not all(link.sound for link in links):
        _refuse("the chain is broken: see the lines marked !")


@app.command("find-row")
def find_row(
    name: ModelName,
    row: Annotated[str, typer.Argument(metavar="ROW", help="A row_id, or a row as JSON (- for standard input).")],
) -> None:
    """Say of each version whether a row was trained on, held out, or absent. Needs the store that it was made in.

    Example: sft models find-row demo '{"text": "### Human: Hi### Assistant: Hello"}'
    """
    from cli.console import SafeConsole
    from cli.models_text import row_table
    from tasks.lineage import find_row_uses

    found = find_row_uses(name, sys.stdin.read() if row == "-" else row)
    if not found:
        _refuse(f"no version of {name!r} in the registry; `sft models list` shows the names")
    SafeConsole().print(row_table(found))
    trained = [version.number for version, use in found if use.use == "trained"]
    unknown = [version.number for version, use in found if use.use == "unknown"]
    say(f"trained on it: {', '.join(dict.fromkeys(trained)) or 'none'}")
    if unknown:
        say(f"not known, their artifacts are not in the store: {', '.join(dict.fromkeys(unknown))}")


@app.command()
def diff(
    name: ModelName,
    old: Annotated[str, typer.Argument(metavar="OLD", help="Version.")],
    new: Annotated[str, typer.Argument(metavar="NEW", help="Version.")],
    rows: Annotated[int, typer.Option(min=0, help="row_ids shown of each kind.")] = 10,
) -> None:
    """Show what changed between two versions: rows by row_id, recipe keys, libraries, scores."""
    from cli.models_text import difference_lines
    from sft_core.lineage import compare_recorded
    from tasks.lineage import read_trained_rows

    (_, first, before), (_, second, after) = (_recorded(f"{name}/{number}") for number in (old, new))
    difference = compare_recorded(before, after, read_trained_rows(before), read_trained_rows(after))
    say(f"{name} {first.number} -> {second.number}")
    for line in difference_lines(difference, rows):
        say(line)


@app.command()
def reproduce(
    model: Reference,
    into: Annotated[str | None, typer.Option(help="Store to build in; a temporary one by default.")] = None,
) -> None:
    """Run a version's retraining again from what was recorded, and compare every step's files by SHA-256.

    Stops at the first step that differs, with exit status 1. On CPU all are equal.
    """
    import tempfile

    from cli.models_text import compared_line
    from sft_core.lineage import reproduce
    from sft_core.store import Store

    _, _, recorded = _recorded(model)
    with tempfile.TemporaryDirectory(prefix="sft-reproduce-") as scratch:
        first = Store(recorded.recipe["store"])
        for compared in reproduce(recorded, Store(into or scratch), first, lambda line: say(line, to_stderr=True)):
            say(compared_line(compared))
            if not compared.equal:
                _refuse(f"{compared.key} is the first step that differs")
    say("reproduced: every step is equal")


def _recorded(model: str) -> "tuple[str, RegisteredVersion, Recorded]":
    from tasks.lineage import read_recorded
    from tasks.registry import read_version

    name, wanted = split_reference(model)
    version = read_version(name, wanted)
    return name, version, read_recorded(name, version)


def split_reference(model: str) -> tuple[str, str]:
    """Name and version (a number or an alias).

    >>> split_reference("models:/demo@previous"), split_reference("demo/3"), split_reference("demo")
    (('demo', 'previous'), ('demo', '3'), ('demo', 'champion'))
    """
    text = model.removeprefix("models:/")
    name, _, wanted = text.partition("@") if "@" in text else text.partition("/")
    return name, wanted or "champion"


def _refuse(words: str) -> None:
    from sft_core.errors import RegistryError

    raise RegistryError(words)
