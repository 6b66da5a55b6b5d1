"""publish: convert -> merge -> evaluate (tuned, base, champion) -> register."""

from dataclasses import replace
from typing import Any

from prefect import flow

from flows.hooks import end_mlflow_run
from flows.job import open_job
from sft_core.plan import plan_champion
from tasks.convert import convert
from tasks.evaluate import evaluate
from tasks.merge import merge
from tasks.register import find_champion, model_folder, register
from tasks.run_step import call
from tasks.shown import show_version


@flow(
    name="publish",
    flow_run_name="publish {recipe[name]}",
    on_cancellation=[end_mlflow_run],
    on_crashed=[end_mlflow_run],
)
def publish(recipe: dict[str, Any], plan: dict[str, Any] | None = None) -> dict[str, Any]:
    """A checkpoint to a registered version, judged against its base and the champion."""
    with open_job("publish", recipe, plan) as job:
        if "convert" in job.plan.steps:  # it is not where all weights were trained: there is no adapter
            call(convert, job)
        call(merge, job)
        call(evaluate, job, "tuned")
        call(evaluate, job, "base")
        champion = find_champion(job.recipe.model_name)
        if champion is not None:
            job = replace(job, plan=plan_champion(job.plan, job.recipe, champion.merged_fingerprint))
            call(evaluate, job, "champion", model_folder(job.recipe.model_name, champion), champion.number)
        registered = call(register, job, champion)
        show_version(registered)
        return registered
