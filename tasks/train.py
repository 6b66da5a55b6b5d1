"""Task of the step train: PackedDataset + base model -> Checkpoint. Called directly, never submitted: only so does a
cancellation reach the child process."""

import re
import time
from typing import Any
from uuid import UUID

import httpx
from prefect import get_run_logger, task
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.exceptions import PrefectException

from sft_core.steps import run_step
from sft_core.train.holders import newest_holder
from tasks.run_step import STEP, Job, finish

LEAST_SECONDS = 3.0
"""Between two updates of the progress artifact."""


@task(name="train", task_run_name="train {job.recipe.name}", **{**STEP, "retries": 0})
def train(job: Job) -> Any:
    """Train in a child process; its progress lines reach the log and a progress artifact. Resumes from checkpoints."""
    progress = Progress(job.recipe.name)
    run = job.retraining(progress)
    work = run.store.work_in_progress("train", job.plan["train"].fingerprint)
    with job.part.following(lambda: newest_holder(work) / "metrics.jsonl"):
        built = run_step(run, "train")
    progress.end()
    job.part.record("train", built)
    job.part.record_training(run.folder("train") / "metrics.jsonl")
    return finish("train", built)


class Progress:
    """Relays the child's lines to the log, and the last `step ...` line to a progress artifact, at most every
    LEAST_SECONDS. The artifact is made at the first line, so a reused step has none. A server that does not answer
    holds no training up: an exception here would end it."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._artifact: UUID | None = None
        self._shown_at = -LEAST_SECONDS
        self._line: str | None = None

    def __call__(self, line: str) -> None:
        """One line of the child."""
        get_run_logger().info(line)
        if line.startswith("step "):
            self._line = line
            if time.monotonic() - self._shown_at >= LEAST_SECONDS:
                done, total = line.split()[1].split("/")
                self._show(100 * int(done) / int(total))

    def end(self) -> None:
        """Training is done, perhaps early."""
        if self._line is not None:
            self._show(100.0)

    def _show(self, percent: float) -> None:
        self._shown_at = time.monotonic()
        text = f"training {self._name}: {self._line}"
        try:
            if self._artifact is None:
                key = re.sub("[^a-z0-9]+", "-", f"train-{self._name}".lower())  # with one it is on the Artifacts page
                self._artifact = create_progress_artifact(percent, key, text)  # type: ignore[assignment]
            else:
                update_progress_artifact(self._artifact, percent, description=text)
        except (httpx.HTTPError, PrefectException, OSError) as error:
            get_run_logger().warning("progress not shown: %s", error)
