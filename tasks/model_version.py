"""A merged model as a version of a registered model: tags, inputs and a card.

In: a job whose steps are done, the source of its merged model. Out: the number of the version.
"""

import json
from contextlib import suppress

from mlflow.entities import Dataset, DatasetInput, InputTag
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS
from prefect.context import FlowRunContext

from sft_core.artifacts import Manifest
from sft_core.base_model import base_fingerprint
from sft_core.lineage.card import model_card
from sft_core.register import Verdict
from sft_core.steps import Retraining
from tasks.model_files import COPY, ModelFolder, log_folder, refer_to
from tasks.registry import AS_BASE, JUDGED_AGAINST, MERGED, PROMOTE, RUN, VERDICT
from tasks.run_step import Job
from tasks.tracking import client

ADAPTER = "adapter"
"""Folder of the adapter in the run's artifacts."""
DIGEST_CHARACTERS = 32
"""MLflow keeps 36 of a data set's digest."""


def merged_source(job: Job, run: Retraining) -> str:
    """Where the registry finds this job's merged model: a copy of it, or where `register.by_reference` says, the
    artifact in the store."""
    recipe = job.recipe
    folder = ModelFolder(
        run.folder("merge"), job.plan["merge"].fingerprint, recipe.model_name, recipe.evaluate.max_new_tokens
    )
    if recipe.register_.by_reference:
        return refer_to(folder, run.store, run.store.artifact("merge", folder.fingerprint))
    return log_folder(folder, job.part.run_id)


def create_version(job: Job, run: Retraining, source: str, verdict: Verdict, against: str) -> str:
    """Register what `merged_source` gave; the number. To be called under the registry's lock."""
    _log_inputs(job, run)
    if "convert" in job.plan.steps:
        client().log_artifacts(job.part.run_id, str(run.folder("convert")), ADAPTER)
    tags = _tags(job, run) | verdict_tags(verdict, against)
    number = create(job.recipe.model_name, source, job.part.run_id, tags)
    write_card(job, run, number, verdict)
    return number


def create(model_name: str, source: str, run_id: str, tags: dict[str, str]) -> str:
    """A version of the model at `source`, which `log_folder` or `refer_to` gave; its number."""
    with suppress(MlflowException):  # it is there already: else the next call says what is wrong
        client().create_registered_model(model_name)
    if not source.startswith(COPY):
        return str(client().create_model_version(model_name, source, run_id, tags).version)
    model_id = source.removeprefix(COPY)  # as mlflow.register_model does, which prints to the terminal
    number = str(client().create_model_version(model_name, source, tags=tags, model_id=model_id).version)
    linked = json.loads(client().get_logged_model(model_id).tags.get(MLFLOW_MODEL_VERSIONS, "[]"))
    linked.append({"name": model_name, "version": number})
    client().set_logged_model_tags(model_id, {MLFLOW_MODEL_VERSIONS: json.dumps(linked)})
    return number


def write_card(job: Job, run: Retraining, number: str, verdict: Verdict) -> None:
    """The version's description: what it is, and why it was or was not promoted."""
    card = model_card(job.recipe, job.plan, _manifests(job, run), verdict.words)
    client().update_model_version(job.recipe.model_name, number, description=card)


def verdict_tags(verdict: Verdict, against: str) -> dict[str, str]:
    """What a judgement says of a version; a retry may be judged anew."""
    return {VERDICT: verdict.words, PROMOTE: str(verdict.promote).lower(), JUDGED_AGAINST: against}


def _log_inputs(job: Job, run: Retraining) -> None:
    """Raw data sets and conversations as inputs of the run that made the version."""
    inputs = []
    sources = [(d, "training") for d in job.recipe.datasets] + [(d, "evaluation") for d in job.recipe.eval_datasets]
    for index, (source, context) in enumerate(sources):
        manifest = run.manifest(f"fetch/{index}")
        inputs.append(_input(source.path, manifest, context, source.model_dump_json()))
    conversations = run.manifest("normalize")
    uri = run.store.artifact("normalize", conversations.fingerprint).uri
    for side, context in (("train", "training"), ("heldout", "evaluation")):
        inputs.append(_input(f"conversations-{side}", conversations, context, json.dumps({"uri": uri, "side": side})))
    client().log_inputs(job.part.run_id, inputs)


def _input(name: str, manifest: Manifest, context: str, source: str) -> DatasetInput:
    digest = manifest.fingerprint[:DIGEST_CHARACTERS]
    profile = json.dumps(manifest.ledger.get("rows", {}))
    dataset = Dataset(name=name[-500:], digest=digest, source_type="sft-flows", source=source, profile=profile)
    tags = [InputTag("mlflow.data.context", context), InputTag("sft.fingerprint", manifest.fingerprint)]
    return DatasetInput(dataset, tags)


def _manifests(job: Job, run: Retraining) -> dict[str, Manifest]:
    found = {key: run.store.find(step.step, step.fingerprint) for key, step in job.plan.steps.items()}
    return {key: manifest for key, manifest in found.items() if manifest is not None}


def _tags(job: Job, run: Retraining) -> dict[str, str]:
    plan = job.plan
    reports = {which: run.manifest(f"evaluate/{which}").facts["metrics"] for which in ("tuned", "base")}
    flow = FlowRunContext.get()
    tags = {
        MERGED: plan["merge"].fingerprint,
        AS_BASE: base_fingerprint({name: file.sha256 for name, file in run.manifest("merge").files.items()}),
        "sft.retraining": plan.fingerprint,
        "sft.recipe": job.recipe.name,
        "sft.base_model": job.recipe.base_model.path,
        "sft.base_model_revision": plan.base_commit or job.recipe.base_model.revision or "",
        "sft.base_model_fingerprint": plan["train"].inputs["base_model"],
        RUN: job.part.parent_run_id,
        "sft.prefect_flow_run_id": str(flow.flow_run.id) if flow and flow.flow_run else "",
    }
    tags |= {f"sft.{key.replace('/', '.')}": step.fingerprint for key, step in plan.steps.items()}
    for which, metrics in reports.items():
        tags |= {f"sft.{which}.{metric}": f"{value:.6g}" for metric, value in metrics.items() if value is not None}
    return {key: value for key, value in tags.items() if value}
