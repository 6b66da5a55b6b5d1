"""Task of the step normalize: RawDataset -> Conversations."""

from typing import Any

from prefect import task

from sft_core.outlook import check_heldout
from tasks.run_step import STEP, Job, perform


@task(name="normalize", task_run_name="normalize {job.recipe.name}", **STEP)
def normalize(job: Job) -> Any:
    """Run the step, or reuse what the store has. DataError where too few rows are held out for the gate."""
    done = perform(job, "normalize")
    manifest = job.manifest("normalize")
    assert manifest is not None, "it was built or found just now"
    check_heldout(job.recipe, manifest.facts, manifest.ledger)
    return done
