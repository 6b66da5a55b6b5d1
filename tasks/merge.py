"""Task of the step merge: Adapter + base model (or, all weights trained, Checkpoint) -> MergedModel."""

from typing import Any

from prefect import task

from tasks.run_step import STEP, Job, perform


@task(name="merge", task_run_name="merge {job.recipe.name}", **STEP)
def merge(job: Job) -> Any:
    """Run the step, or reuse what the store has."""
    return perform(job, "merge")
