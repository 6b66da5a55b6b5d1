"""`sft data check` and `sft data preview`."""

import json
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cli.preview import preview
from sft_core.terminal import one_line, safe_error, say

if TYPE_CHECKING:
    from sft_core.normalize import CheckReport

app = typer.Typer(no_args_is_help=True, help="Look at data before it is trained on.")


app.command()(preview)


@app.callback()
def data() -> None:
    """Look at data before it is trained on."""


@app.command()
def check(  # noqa: PLR0913 - one parameter an option
    file: Annotated[str, typer.Argument(metavar="FILE", help="File, glob, folder, fsspec URL or hub id.")],
    map_fn: Annotated[
        str | None, typer.Option(help="Shipped name, module:function or path.py:function; else the best fitting one.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Configuration of a hub data set.")] = None,
    split: Annotated[str, typer.Option(help="Split of a hub data set or of a folder.")] = "train",
    source: Annotated[
        Literal["hub", "openmind", "modelscope"] | None,
        typer.Option(help="Whose id FILE is; else a file's or the hub's."),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="RECIPE", help="Whose limits hold: eval_fraction, seed, normalize, register; else defaults."
        ),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit status 1 where `sft run` would fail.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for programs.")] = False,
) -> None:
    """Read and normalize a data set, and report what became of its rows. Nothing is kept.

    Warns where `sft run` on these rows would fail: too many that cannot be used, too few held out for the gate. Names
    the columns that the map_fn does not read, and the system prompt that it adds.

    Example: sft data check rows.jsonl --map-fn alpaca --strict
    """
    from sft_core.normalize import Asked, check_dataset
    from sft_core.recipe import DatasetConfig, resolve

    asked = Asked() if recipe is None else Asked.by(resolve(recipe))
    report = check_dataset(DatasetConfig(path=file, name=name, split=split, source=source), map_fn, asked)
    say(_as_json(file, report) if as_json else _as_text(file, report))
    if strict and report.warnings:
        raise typer.Exit(1)


def _as_json(file: str, report: "CheckReport") -> str:
    fields = {
        "file": file,
        "map_fn": report.map_fn,
        "map_fn_chosen": report.chosen,
        "rows_in": report.rows_in,
        "rows_out": report.rows_out,
        "held_out": report.held_out,
        "quarantined": report.quarantined,
        "set_aside": report.set_aside,
        "warnings": report.warnings,
        "fitting": report.fitting,
        "tried_rows": report.tried_rows,
        "columns": report.columns,
        "dropped_nulls": report.dropped_nulls,
        "unread_columns": report.unread_columns,
        "adds_system_prompt": report.adds_system,
        "examples": report.examples,
        "ledger": report.ledger,
    }
    return json.dumps(fields, indent=2)  # ASCII: an example may hold half of a character, or the console little


def _as_text(file: str, report: "CheckReport") -> str:
    origin = " (the best fitting one)" if report.chosen and report.fitting else ""
    if report.chosen and report.map_fn == "pretrain":
        origin = " (no other reads a row: plain text, without requests and answers)"
    lines = [file, f"map_fn: {report.map_fn}{origin}"]
    if report.adds_system:
        lines.append(f"system prompt that this map_fn adds to every row: {report.adds_system.strip()}")
    if report.unread_columns:
        rows = ", ".join(f"{name} ({count} rows)" for name, count in report.unread_columns.items())
        lines.append(f"columns that this map_fn does not read: {rows}")
    if report.dropped_nulls:
        lines.append(f"keys without a value in tool calls and tools, left out: {report.dropped_nulls}")
    lines += [f"rows in: {report.rows_in}", f"rows out: {report.rows_out}"]
    lines.append(f"held out: {report.held_out} of them (eval_fraction {report.eval_fraction:g})")
    if report.set_aside:
        reasons = ", ".join(f"{count} {reason}" for reason, count in report.set_aside.items())
        lines.append(f"left out of the held-out side: {reasons}")
    lines.append(f"quarantined: {sum(report.quarantined.values())}")
    for reason, count in report.quarantined.items():
        example = report.examples[reason]
        lines.append(f"  {count} {reason}, such as {example['file']} row {example['row_number']}: {example['detail']}")
    if report.little_fits:
        lines.append(_advice(report))
    warnings = [safe_error(f"warning: sft run would fail: {words}") for words in report.warnings]
    return "\n".join([*map(one_line, lines), *warnings])


def _advice(report: "CheckReport") -> str:
    others = {name: count for name, count in report.fitting.items() if count and name != report.map_fn}
    columns = ", ".join(report.columns) or "none"
    if not others:
        return f"No other shipped map_fn reads the columns ({columns}); write your own: path.py:function"
    read = ", ".join(f"{name} ({_reads(name, count, report.tried_rows)})" for name, count in others.items())
    return f"The columns ({columns}) also fit {read}"


def _reads(name: str, count: int, tried: int) -> str:
    from sft_core.normalize import added_system

    added = "; adds a system prompt" if added_system(name) else ""
    return f"reads {count} of the first {tried} rows{added}"
