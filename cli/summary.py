"""What a run ends with: rows, loss, what was registered, answers before and after, what to type next."""

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from cli.console import SafeConsole
from sft_core.artifacts import Manifest
from sft_core.credentials import holds_credential, without_credentials
from sft_core.evaluate.report import answers_ended
from sft_core.plan import Plan
from sft_core.recipe import Recipe
from sft_core.store import Store

METRICS = (
    ("loss", "loss (nats a token)", "{:.4f}"),
    ("perplexity", "perplexity", "{:.2f}"),
    ("token_accuracy", "token accuracy", "{:.1%}"),
    ("exact_match", "exact match", "{:.1%}"),
    ("tool_calls", "tool calls", "{:.1%}"),
)
NUM_SAMPLES = 3


@dataclass(frozen=True, slots=True)
class Ended:
    """How a retraining ended: what `register` returned, or why nothing was trained."""

    registered: dict[str, Any] | None
    skipped: str | None = None


def print_summary(console: SafeConsole, recipe: Recipe, plan: Plan, ended: Ended, seconds: float) -> None:
    """Print the summary of a finished retraining; its figures come from the store's manifests."""
    store = Store(recipe.store)
    manifests = {key: store.find(step.step, step.fingerprint) for key, step in plan.steps.items()}
    found = {key: manifest for key, manifest in manifests.items() if manifest is not None}
    console.rule()
    console.print(_headline(recipe, ended, seconds), highlight=False, soft_wrap=True)
    for line in _figures(found):
        console.print(line, highlight=False, soft_wrap=True)
    if ended.skipped is None:
        console.print(_scores(found))
        _print_samples(console, found)
    if ended.registered is not None:
        console.print(f"[bold]verdict[/]   {escape(ended.registered['verdict'])}\n", highlight=False)
    for label, command in [*_to_decide(ended), *_commands(recipe, ended)]:
        console.print(f"[bold]{label:10}[/]{escape(command)}", highlight=False, soft_wrap=True)


def _headline(recipe: Recipe, ended: Ended, seconds: float) -> str:
    took, result = f"{seconds // 60:.0f} min {seconds % 60:.0f} s", ended.registered
    if ended.skipped is not None:
        return f"[bold]{recipe.name}[/]  [yellow]skipped[/], nothing trained: {escape(ended.skipped)}  ({took})"
    if result is None:
        return f"[bold]{recipe.name}[/]  nothing registered  ({took})"
    aliases = ", ".join(f"@{alias}" for alias in result["aliases"]) or "no alias"
    what = "registered" if result["new"] else "every step reused, nothing new to register:"
    version = f"[bold]{result['model_name']} version {result['version']}[/]"
    return f"[bold]{recipe.name}[/]  {what} {version} ({aliases})  {took}"


def _figures(manifests: dict[str, Manifest]) -> list[str]:
    lines = []
    if (normalize := manifests.get("normalize")) is not None:
        rows, facts = normalize.ledger["rows"], normalize.facts
        lines.append(
            f"[bold]rows[/]      {rows['in']:,} in = {facts['train_rows']:,} to train on + {facts['heldout_rows']:,} "
            f"held out + {set_aside(rows)}"
        )
    if (pack := manifests.get("pack")) is not None:
        facts = pack.facts
        lines.append(
            f"[bold]tokens[/]    {facts['tokens']:,}, {facts['supervised_tokens']:,} of them trained, in "
            f"{facts['packed_rows']:,} packed rows, {facts['fill']:.1%} full; sequences: "
            f"{set_aside(pack.ledger['sequences'])}"
        )
    if (train := manifests.get("train")) is not None:
        facts = train.facts
        lines.append(
            f"[bold]training[/]  {facts['optimizer_steps']:,} optimizer steps, loss {facts['first_loss']:.3f} -> "
            f"{facts['last_loss']:.3f}, {facts['seconds_per_step']:.2f} s a step on {train.device}"
        )
        lines += [f"[bold yellow]warning[/]   {escape(words)}" for words in facts.get("warnings", ())]
    if (evaluate := manifests.get("evaluate/tuned")) is not None and any(evaluate.ledger["rows"]["set_aside"].values()):
        rows = evaluate.ledger["rows"]
        lines.append(f"[bold]held out[/]  {rows['in']:,} rows = {rows['out']:,} scored + {set_aside(rows)}")
    return lines


def set_aside(entry: dict[str, Any]) -> str:
    """A ledger entry's reasons: `3 set aside (empty_answer 3)`."""
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in entry["set_aside"].items() if count)
    return f"{sum(entry['set_aside'].values()):,} set aside{f' ({reasons})' if reasons else ''}"


def _scores(manifests: dict[str, Manifest]) -> Table:
    names = [name for name in ("base", "champion", "tuned") if f"evaluate/{name}" in manifests]
    table = Table("held out", *names, box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for metric, label, form in METRICS:
        values = [manifests[f"evaluate/{name}"].facts["metrics"].get(metric) for name in names]
        if any(value is not None for value in values):
            table.add_row(label, *("-" if value is None else form.format(value) for value in values))
    ended = [answers_ended(manifests[f"evaluate/{name}"].facts) for name in names]
    if any(ended):
        table.add_row("answers that ended", *(words or "-" for words in ended))
    return table


def _print_samples(console: SafeConsole, manifests: dict[str, Manifest]) -> None:
    if not {"evaluate/base", "evaluate/tuned"} <= manifests.keys():
        return
    before = {s["row_id"]: s["answer"] for s in manifests["evaluate/base"].facts["samples"]}
    console.print()
    for sample in manifests["evaluate/tuned"].facts["samples"][:NUM_SAMPLES]:
        console.print(f"[bold]asked[/]     {escape(_short(sample['prompt']))}", highlight=False)
        console.print(
            f"  before  [dim]{escape(_short(before.get(sample['row_id'], '')))}[/]", highlight=False, soft_wrap=True
        )
        console.print(f"  after   [green]{escape(_short(sample['answer']))}[/]\n", highlight=False)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 100 else f"{line[:97]}..."


def _models(recipe: Recipe, ended: Ended) -> list[str]:
    """The model that there is to talk to: the champion, or the version that did not become it."""
    made = ended.registered
    if made is None:  # a skipped run was held against the champion, or the newest version where there is none
        return []
    return [f"models:/{recipe.model_name}" + ("@champion" if "champion" in made["aliases"] else f"/{made['version']}")]


def _to_decide(ended: Ended) -> list[tuple[str, str]]:
    """How to train all the same; how to approve a version that waits for it."""
    if ended.skipped is not None:
        return [("anyway", "the same command with --set schedule.min_new_rows=0")]
    if ended.registered is None or ended.registered["approval"] is None:
        return []
    version = f"{ended.registered['model_name']} {ended.registered['version']}"
    lines = [("approval", ended.registered["approval"])]
    if ended.registered["approval"].startswith("waiting"):
        for answer in ("promote", "reject"):
            lines.append((answer, f'{_given()}{_programs()}sft models {answer} {version} --reason "..."'))
        if "PREFECT_API_URL" in os.environ:
            server = without_credentials(os.environ["PREFECT_API_URL"]).removesuffix("/api")
            lines.append(("or in", f"{server}: the run promote-NAME-VERSION"))
    return lines


def _programs() -> str:
    return "" if shutil.which("sft") else f"{os.path.relpath(Path(sys.executable).parent)}/"


def _without_secret(variable: str) -> str:
    """Its value, or where that holds a password, the variable as a shell reads it."""
    value = os.environ.get(variable, "")
    return f'"${variable}"' if holds_credential(value) else value


def _given() -> str:
    tracking = _without_secret("MLFLOW_TRACKING_URI")
    return f"MLFLOW_TRACKING_URI={tracking} " if tracking else ""


def _commands(recipe: Recipe, ended: Ended) -> list[tuple[str, str]]:
    """What to type to talk to the model and to look at the run; where a server is configured, its address."""
    programs = _programs()
    tracking = _without_secret("MLFLOW_TRACKING_URI") or f"sqlite:///{Path('mlflow.db').resolve()}"
    home = f"PREFECT_HOME={os.environ['PREFECT_HOME']} " if "PREFECT_HOME" in os.environ else ""
    mlflow_ui = f"{programs}mlflow ui --backend-store-uri {tracking}   (then http://127.0.0.1:5000)"
    prefect_ui = f"{home}{programs}prefect server start   (then http://127.0.0.1:4200)"
    if "PREFECT_API_URL" in os.environ:
        prefect_ui = without_credentials(os.environ["PREFECT_API_URL"]).removesuffix("/api")
    return [
        *(("chat", f"{_given()}{programs}sft chat {model}") for model in _models(recipe, ended)),
        ("MLflow", tracking if tracking.startswith("http") else mlflow_ui),
        ("Prefect", prefect_ui),
    ]
