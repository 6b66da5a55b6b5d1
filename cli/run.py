"""`sft run`, `sft train`, `sft explain`."""

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sft_core.terminal import say

if TYPE_CHECKING:
    from cli.summary import Ended

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="Name of a shipped recipe, a YAML file, or an fsspec URL.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one key, such as train.learning_rate=1e-4. Repeatable."),
]


def run(
    recipe: RecipeArgument,
    set_: SetOption = None,
    rehearse: Annotated[
        bool,
        typer.Option("--rehearse", help="Try the recipe on CPU first: tiny random weights, few rows, scratch store."),
    ] = False,
    rehearse_rows: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Rows for a rehearsal, of a source that cannot be reached. Repeatable."),
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep what a rehearsal made.")] = False,
) -> None:
    """Retrain: all eight steps as a Prefect flow, the result in the MLflow registry.

    Steps whose inputs did not change are reused from the store. With no Prefect server configured (PREFECT_API_URL), a
    temporary one is used; MLflow is what MLFLOW_TRACKING_URI says, ./mlflow.db by default.

    With --rehearse the same flow runs on a recipe made from this one, in about a minute and on CPU: a tiny random model
    of the same architecture with the real tokenizer, the first rows of every source, three optimizer steps, a scratch
    registry.

    Ctrl-C stops it within seconds and says what was reached: a training saves first, steps that are done are reused, a
    stopped run promotes nothing, and the same command goes on. A second Ctrl-C ends it at once. Exit status: 0 done,
    1 an error, 130 stopped by Ctrl-C, 143 by SIGTERM, 129 because its terminal was closed.

    Example: sft run demo --set train.num_train_epochs=2
    """
    from cli.console import SafeConsole
    from cli.stopped import telling
    from cli.summary import print_summary
    from demo.provide import provide_base_model
    from sft_core.errors import RecipeError
    from sft_core.recipe import parse_settings, resolve

    if (rehearse_rows or keep) and not rehearse:
        raise typer.BadParameter("--rehearse-rows and --keep go with --rehearse")
    clock = time.monotonic()
    overrides = parse_settings(set_ or [])
    resolved = resolve(recipe, overrides)
    provide_base_model(resolved.base_model.path)
    if rehearse:
        from cli.rehearse import rehearse as rehearse_recipe

        with telling(lambda: "in the rehearsal"):
            rehearse_recipe(resolved, rehearse_rows or [], keep, lambda file: _run_flow(file, {}).registered)
        return
    for key in ("datasets", "eval_datasets"):
        if key in overrides:
            raise RecipeError(f"--set {key}: the data sets of a run are its recipe's; edit a copy (sft recipes copy)")
    plan, ended = _retrain(recipe, resolved, overrides)
    print_summary(SafeConsole(), resolved, plan, ended, time.monotonic() - clock)


def train(
    recipe: RecipeArgument,
    set_: SetOption = None,
    deepspeed: Annotated[
        str | None,
        typer.Option(metavar="PRESET", help="train.deepspeed: zero1 to zero3, zero2_offload, ..., or a JSON file."),
    ] = None,
    launcher: Annotated[
        str | None,
        typer.Option(metavar="torchrun|slurm|none", help="What starts the ranks; torchrun for several by default."),
    ] = None,
    ddp_timeout: Annotated[
        float, typer.Option(metavar="SECONDS", help="How long ranks wait for one another before the run is an error.")
    ] = 600,
) -> None:
    """Fetch, normalize, pack and train, without Prefect and MLflow, on one machine or several.

    Leaves the checkpoint in the recipe's store and prints where. Started again after a crash, it goes on from the last
    complete checkpoint. Several machines: NNODES, NODE_RANK, ADDR, PORT and NPROC_PER_NODE in the environment, the same
    command on each; or srun with --launcher slurm. Exit status: 0 done, 1 an error, 75 stopped by SIGTERM after saving
    (143 before training has begun), 130 by Ctrl-C, 129 because its terminal was closed. Next: sft convert pth-to-hf.
    """
    from cli.launch import read_launch, train_as, with_ranks
    from demo.provide import provide_base_model
    from sft_core.recipe import merge_keys, parse_settings, resolve

    launch = read_launch(os.environ, launcher, ddp_timeout)
    overrides = parse_settings(set_ or [])
    if deepspeed is not None:
        overrides = merge_keys(overrides, {"train": {"deepspeed": deepspeed}})
    resolved = resolve(recipe, with_ranks(os.environ, launch, overrides, resolve(recipe, overrides)))
    provide_base_model(resolved.base_model.path)
    train_as(launch, resolved)


def explain(
    recipe: RecipeArgument,
    set_: SetOption = None,
    gpu: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Forecast memory and time on this GPU instead: h100, 8xh100, rtx4090, ..."),
    ] = None,
) -> None:
    """Say of each step whether it would be reused, and if not, which part changed.

    With --gpu: what training would take of that GPU, by what holds it, tokens a second and hours, counted on the
    model's own code from its config.json alone. Nothing is downloaded but that; no source is read. Exit status 1 where
    it cannot fit. Speeds are estimates.

    Example: sft explain llama3_1_8b_instruct_qlora_oasst1_e3 --gpu h100 --set train.gradient_checkpointing=auto
    """
    from rich.table import Table

    from cli.console import SafeConsole
    from sft_core.explain import explain_plan
    from sft_core.plan import plan_recipe
    from sft_core.recipe import parse_settings, resolve
    from sft_core.store import Store

    resolved = resolve(recipe, parse_settings(set_ or []))
    if gpu is not None:
        from cli.forecast import print_forecast

        print_forecast(SafeConsole(), resolved, gpu)
        return
    table = Table("step", "fingerprint", "", "why", box=None, pad_edge=False)
    plan = plan_recipe(resolved)
    for entry in explain_plan(plan, Store(resolved.store), resolved.name):
        verdict = "[green]reused[/]" if entry.reused else "[yellow]rebuilt[/]"
        table.add_row(entry.key, entry.fingerprint[:12], verdict, entry.why)
    SafeConsole().print(table)
    for note in plan.notes:
        say(f"note: {note}")


def _retrain(recipe: str, resolved: Any, overrides: dict[str, Any]) -> "tuple[Any, Ended]":
    """The plan, and how its run ended. `overrides` are used up."""
    from cli.stopped import reached_in, telling
    from cli.summary import Ended
    from sft_core.plan import plan_recipe

    with telling(lambda: "while planning; nothing was begun"):
        say(f"planning {resolved.name}: hashing the sources and the base model", to_stderr=True)
        plan = plan_recipe(resolved)
    with telling(lambda: reached_in(resolved, plan)):
        ended = Ended(_registered_already(resolved, plan))
        if ended.registered is None:
            ended = _run_flow(recipe, overrides)
            if ended == Ended(None):  # a deployment registered it
                ended = Ended(_registered_already(resolved, plan))
    return plan, ended


def _registered_already(recipe: Any, plan: Any) -> dict[str, Any] | None:
    """The summary of an earlier identical run, if the registry and the store still have all of it."""
    from sft_core.store import Store

    store = Store(recipe.store)
    if any(store.find(step.step, step.fingerprint) is None for step in plan.steps.values()):
        return None
    from tasks.register import registered_summary  # imports mlflow

    return registered_summary(recipe.model_name, plan["merge"].fingerprint)


def _run_flow(recipe: str, overrides: dict[str, Any]) -> "Ended":
    say("starting Prefect", to_stderr=True)
    from cli.environment import debugging
    from cli.prefect_console import quiet_tracebacks
    from cli.prefect_database import migrating_alone
    from cli.summary import Ended
    from cli.temporary_server import start_temporary_server
    from sft_core.recipe.overrides import GeneralOverrides

    with migrating_alone():
        wait_ready = start_temporary_server()
        from flows.retrain import retrain  # slow, while the server starts

        wait_ready()
    general = {key: overrides.pop(key) for key in GeneralOverrides.model_fields if key in overrides}
    if not debugging():
        quiet_tracebacks()
    state = retrain(recipe=recipe, general=general or None, return_state=True, **overrides)
    registered = state.result()  # raises what the flow raised
    return Ended(registered, state.message if state.name == "Skipped" else None)
