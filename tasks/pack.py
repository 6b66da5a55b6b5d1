"""Task of the step pack: Conversations -> PackedDataset. The last step that moves rows: it shows the data's ledger.

All that is known before training is known now: a run that can promote nothing ends here, and the log says what is
likely to go wrong.
"""

from typing import Any

from prefect import get_run_logger, task

from sft_core.outlook import check_scorable
from tasks.run_step import STEP, Job, perform
from tasks.shown import show_ledger


@task(name="pack", task_run_name="pack {job.recipe.name}", **STEP)
def pack(job: Job) -> Any:
    """Run the step, or reuse what the store has. DataError where too few held-out rows can be scored."""
    done = perform(job, "pack")
    show_ledger(job)
    if job.manifest("train") is None:
        run = job.retraining(get_run_logger().info)
        check_scorable(run.recipe, run.folder("normalize"), run.folder("pack"), run.plan.chat_template)
        for words in run.warnings():
            get_run_logger().warning("%s", words)
    return done
