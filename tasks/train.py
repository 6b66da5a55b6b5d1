"""Task of the step train: PackedDataset + base model -> Checkpoint. Called directly, never submitted: only so does a
cancellation reach the child process."""

from typing import Any
from uuid import UUID

from prefect import get_run_logger, task
from prefect.artifacts import create_progress_artifact, update_progress_artifact

from sft_core.steps import run_step
from tasks.run_step import STEP, Job, finish


@task(name="train", task_run_name="train-{job.recipe.name}", **{**STEP, "retries": 0})
def train(job: Job) -> Any:
    """Train in a child process; its progress lines reach the log and a progress artifact. Resumes from checkpoints."""
    run = job.retraining(_Progress(job.recipe.name))
    work = run.store.work_in_progress("train", job.plan["train"].fingerprint)
    with job.part.following(work / "metrics.jsonl"):
        built = run_step(run, "train")
    job.part.record("train", built)
    job.part.record_training(run.folder("train") / "metrics.jsonl")
    return finish("train", built)


class _Progress:
    """Relays the child's lines; the artifact is made at the first one, so a reused step has none."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._artifact: UUID | None = None

    def __call__(self, line: str) -> None:
        get_run_logger().info(line)
        if not line.startswith("step "):
            return
        done, total = line.split()[1].split("/")
        percent = 100 * int(done) / int(total)
        if self._artifact is None:
            self._artifact = create_progress_artifact(percent, description=f"training {self._name}")  # type: ignore[assignment]
        else:
            update_progress_artifact(self._artifact, percent, description=line)
