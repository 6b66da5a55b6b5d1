"""From a flow's parameters (names, plain values) to what tasks take; and from one part to the next."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from sft_core.errors import TrainError
from sft_core.plan import Plan, plan_recipe
from sft_core.recipe import Recipe, resolve
from tasks.run_step import Job
from tasks.tracking import part_run


@contextmanager
def open_job(part: str, recipe: Mapping[str, Any] | str, plan: Mapping[str, Any] | None) -> Iterator[Job]:
    """The part's job. Started by hand, a part gets no plan and makes it itself."""
    resolved: Recipe = resolve(recipe)
    planned = Plan.from_dict(plan) if plan is not None else plan_recipe(resolved)
    with part_run(part, resolved, planned) as run:
        yield Job(recipe=resolved, plan=planned, part=run)


def run_part(flow: Any, deployment: str | None, recipe: Recipe, plan: Plan) -> Any:
    """Run a part's flow here, or, where the recipe names a deployment, hand it to that one's work pool and wait."""
    parameters = {"recipe": recipe.as_dict(), "plan": plan.as_dict()}
    if deployment is None:
        return flow(**parameters)
    from prefect.deployments import run_deployment  # needs a server

    finished = run_deployment(deployment, parameters=parameters, as_subflow=True)
    if not finished.state.is_completed():
        raise TrainError(
            f"{deployment}: flow run {finished.name} ended {finished.state.name}: {finished.state.message}"
        )
    return None
