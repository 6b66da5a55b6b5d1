"""Whether a scheduled run has anything to learn: decided after prepare, before anything is trained.

In: recipe and plan, whose conversations are in the store. Out: why the run ends here, or None. What is compared with
is the champion, else the newest version. In doubt the run goes on.
"""

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from sft_core.explain import differences
from sft_core.lineage import Recorded
from sft_core.lineage.rows import conversation_row_ids
from sft_core.plan import Plan
from sft_core.recipe import Recipe
from sft_core.store import Store
from tasks.lineage import read_recorded
from tasks.registry import find_champion, read_versions
from tasks.tracking import client, find_run

SKIPPED = "sft.skipped"
"""Tag of the retraining's MLflow run: why nothing was trained."""
STEPS_OF_THE_RECIPE = ("pack", "train")
"""Steps whose recipe keys, where they changed, are a reason to train the same rows again."""


@task(name="new-rows", task_run_name="new-rows-{recipe.name}", cache_policy=NO_CACHE, persist_result=False)
def reason_to_skip(recipe: Recipe, plan: Plan) -> str | None:
    """Why there is nothing to learn, recorded in MLflow too; None to go on."""
    reason = _find_reason(recipe, plan)
    run_id = find_run(recipe, plan, None)
    if run_id is not None:
        tags = client().get_run(run_id).data.tags
        if reason is not None:
            client().set_tag(run_id, SKIPPED, reason)
        elif SKIPPED in tags:
            client().delete_tag(run_id, SKIPPED)
    return reason


def _find_reason(recipe: Recipe, plan: Plan) -> str | None:
    wanted, store, log = recipe.schedule.min_new_rows, Store(recipe.store), get_run_logger().info
    if wanted == 0:
        return None
    if store.find("train", plan["train"].fingerprint) is not None:
        log("new rows: this plan was trained already; not skipped")
        return None
    versions = read_versions(recipe.model_name)
    version = find_champion(recipe.model_name) or (versions[-1] if versions else None)
    if version is None:
        log("new rows: no version of %s yet; not skipped", recipe.model_name)
        return None
    recorded = read_recorded(recipe.model_name, version)
    changed = recipe_changes(recorded, plan)
    if changed:
        log("new rows: the recipe changed since version %s (%s); not skipped", version.number, "; ".join(changed))
        return None
    known = conversation_row_ids(store, recorded.plan["steps"]["normalize"]["fingerprint"], "train")
    if known is None:
        log("new rows: the conversations of version %s are not in %s; not skipped", version.number, store.url)
        return None
    rows = conversation_row_ids(store, plan["normalize"].fingerprint, "train")
    assert rows is not None, "prepare wrote the conversations of this plan"
    before, now = frozenset(known), frozenset(rows)
    new, gone = len(now - before), len(before - now)
    if new >= wanted:
        log("new rows: %s since version %s", f"{new:,}", version.number)
        return None
    removed = f" ({gone:,} were taken out)" if gone else ""
    return (
        f"{new:,} new rows since version {version.number} of {recipe.model_name}{removed}; "
        f"schedule.min_new_rows is {wanted:,}"
    )


def recipe_changes(recorded: Recorded, plan: Plan) -> list[str]:
    """What of pack, train and base model is not as it was, in words."""
    before, found = recorded.plan["steps"], []
    for key in STEPS_OF_THE_RECIPE:
        found += differences(before[key]["parts"], plan[key].parts)
    base = [steps["train"]["inputs"]["base_model"] for steps in (before, plan.as_dict()["steps"])]
    return found + (["base_model"] if base[0] != base[1] else [])
