"""Task of the step fetch: source -> RawDataset."""

from typing import Any

from prefect import task

from tasks.run_step import STEP, Job, perform


@task(name="fetch", task_run_name="fetch-{key}", **STEP)
def fetch(job: Job, key: str) -> Any:
    """Copy one source's rows, unchanged, into the store. `key` is `fetch/0`, `fetch/1`, in the recipe's order."""
    return perform(job, key)
