"""retrain: the parent. Resolves the recipe once, names every artifact, then prepare -> train -> publish.

Where prepare found too few new rows, the run ends as `Skipped` before anything is trained.
"""

from pathlib import PurePath
from typing import Any

from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact
from prefect.runtime import flow_run
from prefect.states import Cancelled, Completed

from demo.provide import provide_base_model
from flows.handover import PartCancelled
from flows.hooks import cancel_children
from flows.job import run_part
from flows.prepare import prepare
from flows.publish import publish
from flows.train import train as train_flow
from flows.unwanted import ends_when_unwanted
from sft_core.plan import Plan, plan_recipe
from sft_core.recipe import Recipe
from sft_core.recipe.overrides import (
    BaseModelOverrides,
    ComputeOverrides,
    EvaluateOverrides,
    GeneralOverrides,
    MergeOverrides,
    NormalizeOverrides,
    PackOverrides,
    RegisterOverrides,
    ScheduleOverrides,
    TrainOverrides,
    collect_overrides,
)
from sft_core.recipe.show import as_markdown
from tasks.asked import resolve_asked
from tasks.comparable import require_comparable_champion
from tasks.fetch import source_name
from tasks.run_step import call
from tasks.schedule import reason_to_skip
from tasks.shown import artifact_key, show_retraining


def _run_name() -> str:
    return f"retrain {PurePath(source_name(flow_run.parameters['recipe'])).stem}"


@flow(name="retrain", flow_run_name=_run_name, on_cancellation=[cancel_children], on_crashed=[cancel_children])
def retrain(  # noqa: PLR0913 - one parameter a section, as the form shows them
    recipe: str,
    general: GeneralOverrides | None = None,
    base_model: BaseModelOverrides | None = None,
    schedule: ScheduleOverrides | None = None,
    normalize: NormalizeOverrides | None = None,
    pack: PackOverrides | None = None,
    train: TrainOverrides | None = None,
    merge: MergeOverrides | None = None,
    evaluate: EvaluateOverrides | None = None,
    register: RegisterOverrides | None = None,
    compute: ComputeOverrides | None = None,
) -> Any:
    """Retrain one model. Gives what was registered, None where a deployment did it, or a state: `Skipped`,
    `Cancelled` with its part.

    Args:
        recipe: Name of a shipped recipe or a .yaml file of the project; of a deployment that allows it, a URL.
        general: Name, seed, store, held-out fraction and the bound on lost data, where they differ from the recipe.
        base_model: Keys that differ from the recipe.
        schedule: Keys that differ from the recipe.
        normalize: Keys that differ from the recipe.
        pack: Keys that differ from the recipe.
        train: Keys that differ from the recipe.
        merge: Keys that differ from the recipe.
        evaluate: Keys that differ from the recipe.
        register: Keys that differ from the recipe.
        compute: Deployments that run the parts; none runs them in this process.
    """
    sections = {
        "base_model": base_model,
        "schedule": schedule,
        "normalize": normalize,
        "pack": pack,
        "train": train,
        "merge": merge,
        "evaluate": evaluate,
        "register": register,
        "compute": compute,
    }
    resolved = resolve_asked(recipe, collect_overrides(general, sections))
    create_markdown_artifact(
        as_markdown(resolved), artifact_key("recipe", resolved.name), "The resolved recipe of this run"
    )
    try:
        with ends_when_unwanted():
            provide_base_model(resolved.base_model.path)
            require_comparable_champion(resolved.model_name)
            return _parts(resolved, plan_recipe(resolved))
    except PartCancelled as cancelled:
        return Cancelled(message=str(cancelled))


def _parts(recipe: Recipe, plan: Plan) -> Any:
    for note in plan.notes:
        get_run_logger().info("note: %s", note)
    run_part(prepare, recipe.compute.prepare, recipe, plan)
    skipped = call(reason_to_skip, recipe, plan)
    if skipped is not None:
        return Completed(name="Skipped", message=skipped)
    run_part(train_flow, recipe.compute.train, recipe, plan)
    registered = run_part(publish, recipe.compute.publish, recipe, plan)
    show_retraining(recipe, plan)
    return registered
