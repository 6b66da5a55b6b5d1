"""Who asked for a flow run, and what its parameters may therefore name.

In: a flow's parameters. Out: the resolved recipe and the plan. A run of a deployment was asked for by whoever reaches
the Prefect server: `sft_core.recipe.foreign`. Any other run was started by its own process (`sft run`), whose user may
name whatever that user can read.
"""

import re
from collections.abc import Mapping
from typing import Any

from prefect.context import FlowRunContext

from sft_core.errors import RecipeError
from sft_core.plan import Plan
from sft_core.recipe import Recipe, resolve
from sft_core.recipe.foreign import resolve_foreign

FINGERPRINT = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")
"""SHA-256, or a hub's commit."""
KEY = re.compile(r"[a-z]+(/[a-z0-9]+)?")


def asked_from_server() -> bool:
    """Whether this flow run is a deployment's."""
    context = FlowRunContext.get()
    return context is not None and context.flow_run is not None and context.flow_run.deployment_id is not None


def resolve_asked(recipe: str | Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Recipe:
    """`resolve` by the rules for whoever asked. RecipeError."""
    return resolve_foreign(recipe, overrides) if asked_from_server() else resolve(recipe, overrides)


def plan_asked(plan: Mapping[str, Any]) -> Plan:
    """The plan that came as a parameter. RecipeError where it names anything but artifacts: they become paths."""
    try:
        planned = Plan.from_dict(plan)
        names = [name for step in planned.steps.values() for name in (step.fingerprint, *step.inputs.values())]
        wrong = [key for key, step in planned.steps.items() if step.key != key or not KEY.fullmatch(key)]
        wrong += [name for name in (*names, planned.base_commit or "0" * 40) if not FINGERPRINT.fullmatch(name)]
    except (KeyError, TypeError, AttributeError):
        wrong = ["its form"]
    if wrong:
        raise RecipeError(
            "plan: this is none that a retraining made; leave the parameter empty, and the part makes its own"
        )
    return planned
