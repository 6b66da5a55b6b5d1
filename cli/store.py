"""`sft store`: what lies in a store, whether its bytes are as they were written, what can go."""

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from sft_core.terminal import say

if TYPE_CHECKING:
    from sft_core.store_gc import Decision
    from sft_core.store_survey import Entry

app = typer.Typer(no_args_is_help=True, help="The artifact store: list, verify, remove what nobody needs.")
StoreArgument = Annotated[str, typer.Argument(metavar="STORE", help="Folder or fsspec URL, such as s3://bucket/sft.")]


@app.command("ls")
def ls(store: StoreArgument = "./store") -> None:
    """Show every artifact, and what else takes room, with size and last use."""
    from rich.filesize import decimal
    from rich.table import Table

    table = Table("kind", "step", "fingerprint", "name", "size", "last used", box=None, pad_edge=False)
    entries = _survey(store)
    for entry in entries:
        table.add_row(*_cells(entry), decimal(entry.size), f"{entry.last_used:%Y-%m-%d %H:%M}Z")
    _print(table)
    say(f"{len(entries)} entries, {decimal(sum(entry.size for entry in entries))}")


@app.command()
def verify(store: StoreArgument = "./store") -> None:
    """Read every file of every artifact and compare it with its SHA-256. Exit status 1 if one is damaged.

    To mend one: delete its folder, and run its recipe again.
    """
    from sft_core.errors import StoreError
    from sft_core.store import Store
    from sft_core.store_survey import ARTIFACT, TORN, damage

    opened = Store(store)
    entries = [entry for entry in _survey(store) if entry.kind == ARTIFACT or (entry.kind == TORN and not entry.holder)]
    damaged = 0
    for entry in entries:
        lines = damage(opened, entry)
        damaged += bool(lines)
        say(f"{'damaged' if lines else 'sound  '}  {entry.step} {entry.fingerprint[:12]}")
        for line in lines:
            say(f"  {line}")
    if damaged:
        raise StoreError(
            f"{damaged} of {len(entries)} artifacts in {store} are damaged; delete their folders and run again"
        )
    say(f"all {len(entries)} artifacts are sound")


@app.command()
def gc(
    store: StoreArgument = "./store",
    keep_days: Annotated[int, typer.Option(min=1, help="Days after its last use that an artifact is kept.")] = 30,
    delete: Annotated[bool, typer.Option("--delete", help="Remove; without it nothing is changed.")] = False,
    without_registry: Annotated[
        bool, typer.Option("--without-registry", help="Go on although the registry holds no version.")
    ] = False,
) -> None:
    """Show what no registered version and no run of the last days needs; with --delete, remove it.

    The registry is what MLFLOW_TRACKING_URI says. Everything that a registered version was made of is kept.

    Example: sft store gc s3://bucket/sft --keep-days 60
    """
    from sft_core.errors import StoreError
    from sft_core.store_gc import decide
    from tasks.store_needs import registered_fingerprints, registry_uri

    registered = registered_fingerprints()
    versions = len(set(registered.values()))
    say(f"registry {registry_uri()}: {versions} versions", to_stderr=True)
    decisions = decide(_survey(store), registered, datetime.now(UTC), keep_days)
    _print(_decisions_table(decisions))
    going = [decision.entry for decision in decisions if not decision.keep]
    if delete and going and not versions and not without_registry:
        raise StoreError(
            f"registry {registry_uri()} holds no version, so nothing protects the models in {store}; set "
            "MLFLOW_TRACKING_URI to the right one, or say --without-registry"
        )
    _remove(store, going, delete)
    _remove_half_uploads(delete)


def _remove_half_uploads(delete: bool) -> None:
    """Copies in the registry that a killed process left half there; they were of no use to anybody."""
    from datetime import timedelta

    from sft_core.store_gc import LEFTOVER_DAYS
    from tasks.model_files import discard_half_upload, half_uploads

    for model in list(half_uploads(datetime.now(UTC) - timedelta(days=LEFTOVER_DAYS))):
        what = f"half a copy in the registry, models:/{model.model_id} in {model.artifact_location}"
        if not delete:
            say(f"{what}: can go; --delete removes it")
        else:
            say(f"{what}: {'removed' if discard_half_upload(model) else 'is being uploaded, and stays'}")


def _remove(store: str, going: "list[Entry]", delete: bool) -> None:
    from rich.filesize import decimal

    from sft_core.store import Store
    from sft_core.store_survey import remove

    if not delete:
        say(f"{len(going)} entries, {decimal(sum(e.size for e in going))}, can go; --delete removes them")
        return
    opened = Store(store)
    gone = [entry for entry in going if remove(opened, entry)]
    say(f"{len(gone)} entries removed, {decimal(sum(entry.size for entry in gone))}")
    if len(gone) < len(going):
        say(f"{len(going) - len(gone)} were used meanwhile and stay")


def _decisions_table(decisions: "list[Decision]") -> object:
    from rich.filesize import decimal
    from rich.table import Table

    table = Table("", "kind", "step", "fingerprint", "name", "size", "why", box=None, pad_edge=False)
    for decision in decisions:
        word = "[green]keep[/]" if decision.keep else "[yellow]remove[/]"
        table.add_row(word, *_cells(decision.entry), decimal(decision.entry.size), decision.why)
    return table


def _cells(entry: "Entry") -> tuple[str, str, str, str]:
    return entry.kind, entry.step, entry.fingerprint[:12], entry.manifest.name if entry.manifest else ""


def _survey(store: str) -> "list[Entry]":
    from sft_core.store import Store
    from sft_core.store_survey import survey

    return survey(Store(store), datetime.now(UTC))


def _print(table: object) -> None:
    from cli.console import SafeConsole

    SafeConsole().print(table)
