"""Task of the step normalize: RawDataset -> Conversations."""

from typing import Any

from prefect import task

from tasks.run_step import STEP, Job, perform


@task(name="normalize", task_run_name="normalize {job.recipe.name}", **STEP)
def normalize(job: Job) -> Any:
    """Run the step, or reuse what the store has."""
    return perform(job, "normalize")
