"""Task of the step evaluate: one model + held-out Conversations -> EvaluationReport."""

from pathlib import Path
from typing import Any

from prefect import task

from tasks.run_step import STEP, Job, perform


@task(name="evaluate", task_run_name="evaluate-{which}", **STEP)
def evaluate(job: Job, which: str, champion: Path | None = None) -> Any:
    """Score `tuned`, `base`, or the `champion` whose files are in the folder given."""
    return perform(job, f"evaluate/{which}", champion)
