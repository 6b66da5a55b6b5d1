"""retrain: the parent. Resolves the recipe once, names every artifact, then prepare -> train -> publish."""

from pathlib import PurePath
from typing import Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.runtime import flow_run

from flows.job import run_part
from flows.prepare import prepare
from flows.publish import publish
from flows.train import train as train_flow
from sft_core.plan import plan_recipe
from sft_core.recipe import resolve
from sft_core.recipe.overrides import (
    BaseModelOverrides,
    ComputeOverrides,
    EvaluateOverrides,
    GeneralOverrides,
    MergeOverrides,
    NormalizeOverrides,
    PackOverrides,
    RegisterOverrides,
    TrainOverrides,
    collect_overrides,
)
from sft_core.recipe.show import as_markdown


def _run_name() -> str:
    return f"retrain-{PurePath(flow_run.parameters['recipe']).stem}"


@flow(name="retrain", flow_run_name=_run_name)
def retrain(  # noqa: PLR0913 - one parameter a section, as the form shows them
    recipe: str,
    general: GeneralOverrides | None = None,
    base_model: BaseModelOverrides | None = None,
    normalize: NormalizeOverrides | None = None,
    pack: PackOverrides | None = None,
    train: TrainOverrides | None = None,
    merge: MergeOverrides | None = None,
    evaluate: EvaluateOverrides | None = None,
    register: RegisterOverrides | None = None,
    compute: ComputeOverrides | None = None,
) -> dict[str, Any] | None:
    """Retrain one model.

    Args:
        recipe: Name of a shipped recipe, a path, or an fsspec URL.
        general: Name, seed, store and held-out fraction, where they differ from the recipe.
        base_model: Keys that differ from the recipe.
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
        "normalize": normalize,
        "pack": pack,
        "train": train,
        "merge": merge,
        "evaluate": evaluate,
        "register": register,
        "compute": compute,
    }
    resolved = resolve(recipe, collect_overrides(general, sections))
    create_markdown_artifact(as_markdown(resolved), key="recipe", description="The resolved recipe of this run")
    plan = plan_recipe(resolved)
    run_part(prepare, resolved.compute.prepare, resolved, plan)
    run_part(train_flow, resolved.compute.train, resolved, plan)
    return run_part(publish, resolved.compute.publish, resolved, plan)
