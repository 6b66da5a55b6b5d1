"""Task of the step pack: Conversations -> PackedDataset. The last step that moves rows: it shows the data's ledger."""

from typing import Any

from prefect import task

from tasks.run_step import STEP, Job, perform
from tasks.shown import show_ledger


@task(name="pack", task_run_name="pack {job.recipe.name}", **STEP)
def pack(job: Job) -> Any:
    """Run the step, or reuse what the store has."""
    done = perform(job, "pack")
    show_ledger(job)
    return done
