"""`sft explain RECIPE --gpu NAME`: memory and time of a training on a GPU that need not be there.

In: a resolved recipe, the GPU's name. Out: a table of bytes, the way the rows are split, speed and hours; RecipeError
where it does not fit. Hours follow from `train.max_steps`, or from what this recipe last packed.
"""

from typing import Any

from rich.table import Table

from cli.console import SafeConsole
from sft_core.errors import ModelError
from sft_core.forecast import Forecast, Forecaster, NotCountedError, Trains, read_gpu, size
from sft_core.recipe import Recipe
from sft_core.rehearse.base_model import small_files
from sft_core.store import Store


def print_forecast(console: SafeConsole, recipe: Recipe, name: str) -> None:
    """For `recipe` on the GPU called `name`. RecipeError where it does not fit, or the name is not known."""
    gpu, number = read_gpu(name)
    ranks = number or recipe.train.num_processes or 1
    trains = Trains(
        config=_configuration(recipe),
        train=recipe.train,
        max_length=recipe.pack.max_length,
        ranks=ranks,
        trust_remote_code=recipe.base_model.trust_remote_code,
    )
    forecaster = Forecaster(trains, gpu)
    try:
        chosen = forecaster.choose(gpu.memory)
    except NotCountedError as error:
        raise ModelError(
            f"base_model.path {recipe.base_model.path!r}: its code does not run without numbers, so nothing can be "
            f"counted ({error}); try it on the GPU"
        ) from None
    console.print(_table(chosen, gpu.memory), highlight=False)
    for line in _lines(recipe, chosen, ranks):
        console.print(line, highlight=False, soft_wrap=True)


def _configuration(recipe: Recipe) -> Any:
    from transformers import AutoConfig

    folder, reason = small_files(recipe.base_model)
    if folder is None:
        raise ModelError(f"base_model.path {recipe.base_model.path!r}: its config.json is needed, but {reason}")
    return AutoConfig.from_pretrained(folder, trust_remote_code=recipe.base_model.trust_remote_code)


def _table(forecast: Forecast, memory: float) -> Table:
    table = Table("a GPU holds", "bytes", "", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.columns[1].justify = "right"
    for name, value in forecast.kept.items():
        table.add_row(name, size(value), "")
    table.add_row("activations", size(forecast.activations), "kept from forward to backward")
    table.add_row("logits", size(forecast.logits), "while the loss is taken")
    table.add_row("one layer's work", size(forecast.backward), "while gradients are taken; never beside the logits")
    table.add_row("[bold]peak[/]", f"[bold]{size(forecast.peak)}[/]", f"of {size(memory)}")
    return table


def _lines(recipe: Recipe, forecast: Forecast, ranks: int) -> list[str]:
    train = recipe.train
    rows = train.rows_a_step(ranks)
    speed = forecast.tokens_per_second * ranks / train.sequence_parallel_size
    gpus = f"{ranks} GPUs: " if ranks > 1 else ""
    lines = [
        f"split: {forecast.split}: {rows} packed rows of {recipe.pack.max_length:,} tokens an optimizer step",
        f"speed: {gpus}about {speed:,.0f} tokens/s (estimated; communication between GPUs is not counted)",
    ]
    tokens, source = _tokens(recipe, rows)
    if tokens is None:
        return [*lines, f"time: about {1e8 / speed / 3600:.1f} hours for 100 million tokens ({source})"]
    return [*lines, f"time: about {tokens / speed / 3600:.1f} hours for {tokens:,.0f} tokens ({source})"]


def _tokens(recipe: Recipe, rows_a_step: int) -> tuple[float | None, str]:
    """Of the whole training, and where that is known from."""
    if recipe.train.max_steps is not None:
        steps = recipe.train.max_steps
        return float(steps * rows_a_step * recipe.pack.max_length), f"{steps:,} optimizer steps of full rows"
    packs = [m for m in Store(recipe.store).manifests("pack") if m.name == f"{recipe.name}:pack"]
    if not packs:
        return None, "nothing was packed yet"
    newest = max(packs, key=lambda manifest: manifest.started)
    epochs = recipe.train.num_train_epochs
    return newest.facts["epoch_tokens"] * epochs, f"{epochs:g} epochs of what was packed on {newest.started[:10]}"
