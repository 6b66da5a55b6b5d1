"""Task of the step convert: Checkpoint -> Adapter."""

from typing import Any

from prefect import task

from tasks.run_step import STEP, Job, perform


@task(name="convert", task_run_name="convert {job.recipe.name}", **STEP)
def convert(job: Job) -> Any:
    """Run the step, or reuse what the store has."""
    return perform(job, "convert")
