"""Task of the step pack: Conversations -> PackedDataset."""

from typing import Any

from prefect import task

from tasks.run_step import STEP, Job, perform


@task(name="pack", task_run_name="pack-{job.recipe.name}", **STEP)
def pack(job: Job) -> Any:
    """Run the step, or reuse what the store has."""
    return perform(job, "pack")
