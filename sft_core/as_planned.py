"""What is used is what was planned: a step is named again, from what it reads now, and must have the name it got.

In: a recipe, its plan, a step's key. Out: nothing, or a PlanError that names what differs. Between plan and use files
may be edited, and a worker may have other code, libraries or folders than the planner: what it would build is not what
the address promises to every later run.
"""

from typing import Any

from sft_core.errors import PlanError
from sft_core.explain import differences
from sft_core.plan import Plan, PlannedStep, name_step
from sft_core.plan_parts import Readings, step_inputs, step_parts
from sft_core.recipe import Recipe

CHAMPION = "evaluate/champion"
READS_BASE = ("train", "convert", "merge", "evaluate/base")
"""Steps that load the base model, whether their own inputs name it or those of a step before."""
CODE = ("version: ", "convert: ")
"""Parts that are versions of our own steps."""
ANOTHER_CHECKOUT = "; this machine has another version of sft-flows: install the one that planned the run"


SHOWN = 5
"""Differences that an error names."""


def refuse_changes(recipe: Recipe, plan: Plan, key: str, found: Readings | None = None) -> None:
    """PlanError if `key` would now be another artifact than planned. `found`: what was read, if it was."""
    found = found or Readings(recipe, plan)
    planned, now = plan[key], _now(recipe, plan, key, found)
    before, after = _decided(planned), _decided(now)
    if key in READS_BASE:
        before["base_model"], after["base_model"] = plan["train"].inputs["base_model"], found.base.fingerprint
    changed = differences(before, after)
    if not changed and now.fingerprint != planned.fingerprint:
        changed = [f"fingerprint: {planned.fingerprint[:10]} -> {now.fingerprint[:10]}"]
    if changed:
        more = f"; and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
        hint = ANOTHER_CHECKOUT if any(line.startswith(CODE) for line in changed) else "; start it again"
        what = _what(recipe, key)
        raise PlanError(f"{what}: changed since this run was planned: {'; '.join(changed[:SHOWN])}{more}{hint}")


def _now(recipe: Recipe, plan: Plan, key: str, found: Readings) -> PlannedStep:
    before = {name: step.fingerprint for name, step in plan.steps.items()}
    if key != CHAMPION:
        inputs = step_inputs(key, recipe, found, before)
        return name_step(key, step_parts(key, recipe, found, plan.chat_template), inputs)
    champion = plan[key].inputs["model"]  # registered before this run: no step of the plan makes it
    template = plan.chat_template if champion == before["merge"] else None
    inputs = {"model": champion, "conversations": before["normalize"]}
    return name_step(key, step_parts(key, recipe, found, template), inputs)


def _decided(step: PlannedStep) -> dict[str, Any]:
    """All that the fingerprint is made of."""
    return {**step.parts, "inputs": step.inputs}


def _what(recipe: Recipe, key: str) -> str:
    """The step, with what it reads from outside of the store."""
    step, _, which = key.partition("/")
    if step == "fetch":
        return f"{key} ({(*recipe.datasets, *recipe.eval_datasets)[int(which)].path})"
    return f"{key} (base model {recipe.base_model.path})" if key in READS_BASE else key
