"""prepare: fetch -> normalize -> pack. CPU only."""

from typing import Any

from prefect import flow

from flows.hooks import end_mlflow_run
from flows.job import open_job
from tasks.fetch import fetch
from tasks.normalize import normalize
from tasks.pack import pack
from tasks.run_step import call


@flow(
    name="prepare",
    flow_run_name="prepare {recipe[name]}",
    on_cancellation=[end_mlflow_run],
    on_crashed=[end_mlflow_run],
)
def prepare(recipe: dict[str, Any], plan: dict[str, Any] | None = None) -> None:
    """Raw rows to a packed data set in the store."""
    with open_job("prepare", recipe, plan) as job:
        for index, source in enumerate(job.recipe.datasets + job.recipe.eval_datasets):
            call(fetch, job, index, source.path)
        call(normalize, job)
        call(pack, job)
