"""train: a packed data set and a base model to a checkpoint. Wants a GPU."""

from typing import Any

from prefect import flow

from flows.hooks import end_mlflow_run
from flows.job import open_job
from tasks.run_step import call
from tasks.train import train as train_task


@flow(
    name="train",
    flow_run_name="train {recipe[name]}",
    on_cancellation=[end_mlflow_run],
    on_crashed=[end_mlflow_run],
)
def train(recipe: dict[str, Any], plan: dict[str, Any] | None = None) -> None:
    """Train in a child process, or go on from the last checkpoint in the store."""
    with open_job("train", recipe, plan) as job:
        call(train_task, job)
