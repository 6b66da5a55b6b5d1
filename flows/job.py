"""From a flow's parameters (names, plain values) to what tasks take; and from one part to the next."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from prefect import tags

from flows.handover import hand_over
from flows.unwanted import ends_when_unwanted
from sft_core.plan import Plan, plan_recipe
from sft_core.recipe import Recipe
from tasks.asked import plan_asked, resolve_asked
from tasks.automations import TAG
from tasks.run_step import Job
from tasks.shown import link_runs
from tasks.tracking import part_run


@contextmanager
def open_job(part: str, recipe: Mapping[str, Any] | str, plan: Mapping[str, Any] | None) -> Iterator[Job]:
    """The part's job. Started by hand, a part gets no plan and makes it itself."""
    resolved: Recipe = resolve_asked(recipe)
    planned = plan_asked(plan) if plan is not None else plan_recipe(resolved)
    with ends_when_unwanted(), part_run(part, resolved, planned) as run:
        link_runs(part, resolved.name, run)
        yield Job(recipe=resolved, plan=planned, part=run)


def run_part(flow: Any, deployment: str | None, recipe: Recipe, plan: Plan) -> Any:
    """Run a part's flow here, or, where the recipe names a deployment, hand it over to that one's work pool."""
    if deployment is not None:
        return hand_over(flow.name, deployment, recipe, plan)
    with tags(TAG):
        return flow(recipe=recipe.as_dict(), plan=plan.as_dict())
