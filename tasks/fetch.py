"""Task of the step fetch: source -> RawDataset."""

from typing import Any

from prefect import task

from tasks.run_step import STEP, Job, perform


@task(name="fetch", task_run_name="fetch-{source}", **STEP)
def fetch(job: Job, index: int, source: str) -> Any:
    """Copy the rows of one source, unchanged, into the store. `index` counts datasets, then eval_datasets."""
    return perform(job, f"fetch/{index}")
