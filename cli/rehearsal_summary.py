"""What a rehearsal ends with: each step and its seconds, what was replaced, what was not rehearsed, the real run.

In: the recipe, its rehearsal and what the rehearsal left in the scratch store. Out: lines on the console.
"""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from cli.console import SafeConsole
from cli.summary import set_aside
from sft_core.account import account_line, is_over, loss_of
from sft_core.artifacts import Manifest
from sft_core.outlook import heldout_needed, heldout_shortage
from sft_core.outlook.training import few_steps, read_vocabulary, untrained_words, used_tokens
from sft_core.plan import Plan
from sft_core.recipe import Recipe
from sft_core.rehearse import Rehearsal
from sft_core.rehearse.estimate import RunLength, estimate_length
from sft_core.store import Store

NOT_REHEARSED = (
    "the real weights: their download, their memory, their numbers",
    "GPU kernels, several ranks, and the speed of any step",
    "rows behind the first ones",
    "a champion to be judged against; what the verdict will be",
)
STAND_IN = "the real tokenizer and architecture: lengths are about right, ids and names of layers may differ"


def print_steps(console: SafeConsole, recipe: Recipe, plan: Plan, result: dict[str, Any] | None) -> None:
    """The table of steps. Without a `result`, the first one that left nothing is the one that failed."""
    found = _manifests(recipe, plan)
    table = Table("step", "", "seconds", "", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.columns[2].justify = "right"
    failed = False
    for key in plan.steps:
        manifest = found.get(key)
        if manifest is not None:
            table.add_row(key, "[green]ok[/]", f"{manifest.took_seconds:.1f}", escape(_said(manifest)))
        else:
            table.add_row(key, "[dim]not reached[/]" if failed else "[red]failed[/]", "", "")
            failed = True
    if result is not None:
        version = f"version {result['version']} in the scratch registry, {result['verdict'].partition(':')[0]}"
        table.add_row("register", "[green]ok[/]", f"{_since_last(found):.1f}", escape(version))
    else:
        table.add_row("register", "[dim]not reached[/]" if failed else "[red]failed[/]", "", "")
    console.rule("rehearsal")
    console.print(table, highlight=False)


def print_rehearsal(
    console: SafeConsole, recipe: Recipe, rehearsal: Rehearsal, plan: Plan, result: dict[str, Any]
) -> None:
    """The whole summary of a rehearsal that went through."""
    print_steps(console, rehearsal.recipe, plan, result)
    found = _manifests(rehearsal.recipe, plan)
    _list(console, "replaced", rehearsal.replaced)
    _list(console, "not rehearsed", [*([STAND_IN] if rehearsal.base.stand_in else []), *NOT_REHEARSED])
    _list(console, "look at", [*_warnings(recipe, found), *_outlook(recipe, rehearsal, plan)])
    _list(console, "the real run", _real_run(recipe, rehearsal, plan))
    console.print()


def _list(console: SafeConsole, title: str, lines: tuple[str, ...] | list[str]) -> None:
    if lines:
        console.print(f"\n[bold]{title}[/]")
    for line in lines:
        console.print(f"  {escape(line)}", highlight=False, soft_wrap=True)


def _manifests(recipe: Recipe, plan: Plan) -> dict[str, Manifest]:
    store = Store(recipe.store)
    found = {key: store.find(step.step, step.fingerprint) for key, step in plan.steps.items()}
    return {key: manifest for key, manifest in found.items() if manifest is not None}


def _since_last(found: dict[str, Manifest]) -> float:
    ends = [datetime.fromisoformat(m.started) + timedelta(seconds=m.took_seconds) for m in found.values()]
    return (datetime.now(UTC) - max(ends)).total_seconds()


def _said(manifest: Manifest) -> str:
    """What the step did, in a few words."""
    facts, ledger = manifest.facts, manifest.ledger
    if manifest.step == "fetch":
        return f"{ledger['rows']['out']:,} rows"
    if manifest.step == "normalize":
        aside = set_aside(ledger["rows"])
        return f"{facts['train_rows']:,} to train on + {facts['heldout_rows']:,} held out + {aside}"
    if manifest.step == "pack":
        return (
            f"{facts['tokens']:,} tokens, {facts['supervised_tokens']:,} trained, {facts['packed_rows']:,} packed rows"
        )
    if manifest.step == "train":
        return f"{facts['optimizer_steps']} optimizer steps, loss {facts['first_loss']:.3f} -> {facts['last_loss']:.3f}"
    if manifest.step == "evaluate":
        return f"{ledger['rows']['out']:,} rows scored, loss {facts['metrics']['loss']:.4f}"
    return f"{len(manifest.files)} files"


def _warnings(recipe: Recipe, found: dict[str, Manifest]) -> list[str]:
    lines = []
    normalize, pack = found["normalize"], found["pack"]
    losses = (loss_of("normalize", normalize.ledger), loss_of("pack", pack.ledger))
    allowed = recipe.max_quarantined_fraction
    if account := account_line(allowed, *losses):
        lines.append(f"{'the run fails: ' if is_over(allowed, *losses) else ''}{account}")
    fraction = normalize.facts["quarantined_fraction"]
    if fraction:
        lines.append(f"normalize: {fraction:.1%} of the rows cannot be used: {set_aside(normalize.ledger['rows'])}")
    rows = pack.ledger["sequences"]
    overlong = rows["set_aside"].get("overlong", 0)
    if overlong:
        lines.append(f"pack: {overlong / rows['in']:.1%} of the sequences are over max_length and set aside")
    cut = pack.ledger["tokens"]["set_aside"].get("truncated", 0)
    if cut:
        lines.append(f"pack: {cut / pack.ledger['tokens']['in']:.1%} of the tokens are beyond max_length and cut off")
    if pack.facts["split_sequences"]:
        lines.append(f"pack: {pack.facts['split_sequences'] / rows['in']:.1%} of the sequences are split at max_length")
    others = {reason: count for reason, count in rows["set_aside"].items() if reason != "overlong" and count}
    if others:
        lines.append(f"pack: set aside: {', '.join(f'{reason} {count:,}' for reason, count in others.items())}")
    if pack.facts["special_token_text_rows"]:
        lines.append(f"pack: {pack.facts['special_token_text_rows']:,} rows hold text that reads like special tokens")
    return lines


def _outlook(recipe: Recipe, rehearsal: Rehearsal, plan: Plan) -> list[str]:
    """What the real run would warn of, or fail of, before it trains: as far as the sampled rows and a base model in a
    local folder tell."""
    lines = []
    rows = [sample.total for sample in rehearsal.samples[: len(recipe.datasets)]]
    if not recipe.eval_datasets and None not in rows:
        left = round(sum(total or 0 for total in rows) * recipe.eval_fraction)
        if left < heldout_needed(recipe.register_):
            lines.append(f"normalize: fails in the real run: about {heldout_shortage(left, recipe.register_, {})}")
    length = _length(recipe, rehearsal, plan)
    if length is not None:
        lines += [f"train: {words}" for words in few_steps(recipe, length.packed_rows)]
    base = Path(recipe.base_model.path)
    if base.is_dir() and rehearsal.base.stand_in is None:
        packed = _packed(rehearsal, plan)
        vocabulary = read_vocabulary(packed)
        lines += untrained_words(recipe.train, base, vocabulary, used_tokens(packed, vocabulary))
    return lines


def _packed(rehearsal: Rehearsal, plan: Plan) -> Path:
    store = Store(rehearsal.recipe.store)
    return store.local(store.artifact("pack", plan["pack"].fingerprint))


def _length(recipe: Recipe, rehearsal: Rehearsal, plan: Plan) -> RunLength | None:
    samples = rehearsal.samples[: len(recipe.datasets)]
    return estimate_length(recipe, rehearsal.recipe, _packed(rehearsal, plan), samples)


def _real_run(recipe: Recipe, rehearsal: Rehearsal, plan: Plan) -> list[str]:
    """Length by the sampled rows, memory by the real configuration."""
    lines, stand_in = [], rehearsal.base.stand_in is not None
    length = _length(recipe, rehearsal, plan)
    if length is None:
        lines.append("length: unknown, as nothing tells how many rows the sources have")
    else:
        ranks = f"{length.ranks} rank{'s' if length.ranks > 1 else ''}"
        tokenizer = "; counted by the stand-in's tokenizer" if stand_in else ""
        lines.append(
            f"length: about {length.epoch_tokens:,} tokens an epoch, {length.optimizer_steps:,} optimizer steps on "
            f"{ranks}{tokenizer}"
        )
    if rehearsal.base.real_config is None:
        return [*lines, "memory: unknown without the model's configuration; the recipe's own comment may say"]
    return [*lines, f"memory: {_memory(recipe, rehearsal.base.real_config)}"]


def _memory(recipe: Recipe, config: Any) -> str:
    """Of one GPU, by what the recipe allows: of `auto` the least."""
    from sft_core.forecast import GPUS, Forecaster, NotCountedError, Trains

    trains = Trains(
        config=config,
        train=recipe.train,
        max_length=recipe.pack.max_length,
        ranks=recipe.train.num_processes or 1,
        trust_remote_code=recipe.base_model.trust_remote_code,
    )
    forecaster = Forecaster(trains, GPUS["h100"])
    try:
        least = min((forecaster.of(split) for split in forecaster.splits()), key=lambda one: one.peak)
    except NotCountedError as error:
        return f"this model's code does not run without numbers, so nothing was counted ({error})"
    return f"about {least.arithmetic}, a GPU; sft explain {recipe.name} --gpu h100 says more"
