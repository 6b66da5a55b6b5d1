"""Task of the step register: reports -> verdict -> a version of a registered MLflow model, perhaps the champion.

Idempotent by the merged model's fingerprint: a second run of the same retraining finds its version and makes none.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

import mlflow
from mlflow.exceptions import MlflowException
from prefect import get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.context import FlowRunContext

from sft_core.errors import RegistryError
from sft_core.recipe import Recipe
from sft_core.register import Verdict
from sft_core.register.stored import Judged, judge_stored, stored_manifest
from sft_core.steps import Retraining
from tasks.run_step import STEP, Job
from tasks.tracking import client, download_model

MERGED = "sft.merged_fingerprint"
VERDICT = "sft.verdict"
NO_CHAMPION = "none"
JUDGED_AGAINST = "sft.judged_against"
"""Set on a version: number of the champion that it was judged against, or NO_CHAMPION."""
PAGE = "register.html"
"""The report that explains the verdict: an artifact of the run."""
SETTLED = "sft.settled"
"""Set on a version after its aliases were moved: nothing of its registration is left to do."""
SERVING_REQUIREMENTS = ("torch", "transformers", "accelerate")


@dataclass(frozen=True, slots=True)
class RegisteredVersion:
    """A version of the registered model: its number, the merged model it holds, its aliases."""

    number: str
    merged_fingerprint: str
    aliases: tuple[str, ...]
    verdict: str
    settled: bool


def find_version(model_name: str, merged_fingerprint: str) -> RegisteredVersion | None:
    """The version that holds this merged model, if there is one."""
    query = f"name = '{model_name}' and tags.`{MERGED}` = '{merged_fingerprint}'"
    found = client().search_model_versions(query)
    return _read(model_name, max((v.version for v in found), key=int)) if found else None


def find_champion(model_name: str) -> RegisteredVersion | None:
    """The version that consumers load, if there is one. Any other answer of the registry than yes or no raises."""
    number = _aliases(model_name).get("champion")
    return _read(model_name, number) if number is not None else None


def model_folder(model_name: str, registered: RegisteredVersion) -> Path:
    """Local copy of a registered version's files."""
    return download_model(f"models:/{model_name}/{registered.number}")


def registered_summary(model_name: str, merged_fingerprint: str) -> dict[str, Any] | None:
    """What `register` returned for this merged model, if it finished."""
    found = find_version(model_name, merged_fingerprint)
    return _summary(model_name, found, new=False) if found is not None and found.settled else None


@task(name="register", task_run_name="register-{job.recipe.model_name}", **STEP)
def register(job: Job, champion: RegisteredVersion | None) -> dict[str, Any]:
    """Judge, log the merged model, register a version, move the aliases. Returns version, aliases and verdict."""
    name, run = job.recipe.model_name, job.retraining(get_run_logger().info)
    existing = find_version(name, job.plan["merge"].fingerprint)
    if existing is not None and existing.settled:
        get_run_logger().info("register: version %s of %s holds this model already", existing.number, name)
        return _summary(name, existing, new=False)
    challenge = count_challenges(name, champion, job.plan["merge"].fingerprint) + 1
    judged = judge_stored(run, challenge, against_champion=champion is not None)
    verdict = judged.verdict
    _show(job, judged)
    against = champion.number if champion is not None else NO_CHAMPION
    number = existing.number if existing is not None else _log_version(job, run, verdict)
    for tag, value in {VERDICT: verdict.words, JUDGED_AGAINST: against}.items():  # a retry may be judged anew
        client().set_model_version_tag(name, number, tag, value)
    registered_now = find_champion(name)
    if (registered_now and registered_now.number) != (champion and champion.number):
        raise RegistryError(
            f"{name}: the champion moved from {champion and champion.number} to "
            f"{registered_now and registered_now.number} while this model was judged; run again to judge against it"
        )
    _move_aliases(name, number, champion, promote=verdict.promote)
    get_run_logger().info("register: %s version %s %s", name, number, verdict.words)
    return _summary(name, _read(name, number), new=existing is None)


def count_challenges(model_name: str, champion: RegisteredVersion | None, merged_fingerprint: str) -> int:
    """How many other models were judged against this champion (or, before the first one, against the base)."""
    judged_against = champion.number if champion is not None else NO_CHAMPION
    query = f"name = '{model_name}' and tags.`{JUDGED_AGAINST}` = '{judged_against}'"
    found: list[Any] = []
    token = None
    while True:
        page = client().search_model_versions(query, page_token=token)
        found += page
        token = page.token
        if not token:
            return sum(entry.tags.get(MERGED) != merged_fingerprint for entry in found)


def _show(job: Job, judged: Judged) -> None:
    """The page as an artifact of the MLflow run, the verdict's words as one of the Prefect run."""
    client().log_text(job.part.run_id, judged.page, PAGE)
    place = f"`{PAGE}` in the MLflow run `{job.part.run_id}`"
    create_markdown_artifact(f"{judged.verdict.words}.\n\nThe whole report: {place}", key="verdict")


def _log_version(job: Job, run: Retraining, verdict: Verdict) -> str:
    """Log the merged folder (no weights in memory) and register it as a version."""
    name = job.recipe.model_name
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the folder is complete; looking its name up only costs time
    with mlflow.start_run(run_id=job.part.run_id):
        logged = mlflow.transformers.log_model(
            str(run.folder("merge")),
            name="model",
            task="llm/v1/chat",
            pip_requirements=[f"{package}=={installed(package).partition('+')[0]}" for package in SERVING_REQUIREMENTS],
        )
    tags = _tags(job, run, verdict)
    version = mlflow.register_model(logged.model_uri, name, tags=tags)
    client().update_model_version(name, version.version, description=_description(job.recipe, tags))
    return str(version.version)


def _tags(job: Job, run: Retraining, verdict: Verdict) -> dict[str, str]:
    plan = job.plan
    reports = {which: stored_manifest(run, f"evaluate/{which}").facts["metrics"] for which in ("tuned", "base")}
    flow = FlowRunContext.get()
    tags = {
        MERGED: plan["merge"].fingerprint,
        VERDICT: verdict.words,
        "sft.retraining": plan.fingerprint,
        "sft.recipe": job.recipe.name,
        "sft.base_model": job.recipe.base_model.path,
        "sft.base_model_fingerprint": plan["train"].inputs["base_model"],
        "sft.mlflow_run_id": job.part.parent_run_id,
        "sft.prefect_flow_run_id": str(flow.flow_run.id) if flow and flow.flow_run else "",
    }
    tags |= {f"sft.{key.replace('/', '.')}": step.fingerprint for key, step in plan.steps.items()}
    for which, metrics in reports.items():
        tags |= {f"sft.{which}.{metric}": f"{value:.6g}" for metric, value in metrics.items()}
    return {key: value for key, value in tags.items() if value}


def _description(recipe: Recipe, tags: Mapping[str, str]) -> str:
    return (
        f"`{recipe.base_model.path}` tuned by the recipe `{recipe.name}` on "
        f"{', '.join(d.path for d in recipe.datasets)}.\n\n{tags[VERDICT]}."
    )


def _move_aliases(name: str, number: str, champion: RegisteredVersion | None, *, promote: bool) -> None:
    """`candidate` is the newest version judged; `champion` moves only through the gate, `previous` follows it."""
    client().set_registered_model_alias(name, "candidate", number)
    if promote:
        if champion is not None:
            client().set_registered_model_alias(name, "previous", champion.number)
        client().set_registered_model_alias(name, "champion", number)
    client().set_model_version_tag(name, number, SETTLED, "true")


def _summary(name: str, registered: RegisteredVersion, *, new: bool) -> dict[str, Any]:
    return {
        "model_name": name,
        "version": registered.number,
        "aliases": list(registered.aliases),
        "verdict": registered.verdict,
        "new": new,
    }


def _aliases(model_name: str) -> Mapping[str, str]:
    try:
        return {alias: str(at) for alias, at in client().get_registered_model(model_name).aliases.items()}
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return {}
        raise


def _read(model_name: str, number: str) -> RegisteredVersion:
    entry = client().get_model_version(model_name, number)
    aliases = tuple(sorted(alias for alias, at in _aliases(model_name).items() if at == str(number)))
    if MERGED not in entry.tags:
        raise RegistryError(
            f"models:/{model_name}/{number} was not registered by sft-flows (no tag {MERGED}); use another name"
        )
    settled = SETTLED in entry.tags
    return RegisteredVersion(str(number), entry.tags[MERGED], aliases, entry.tags.get(VERDICT, ""), settled)
