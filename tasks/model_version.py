"""A merged model into MLflow: logged once as a model, registered as a version with tags, inputs and a card.

In: a job whose steps are done. Out: the id of the logged model; the number of the version. Weights are uploaded file
by file, never loaded, and copied once; the description of the model comes last, so one without weights is never READY.
"""

import json
import shutil
import tempfile
from dataclasses import dataclass
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

import mlflow
from huggingface_hub import ModelCard
from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelOutput
from mlflow.models import Model
from prefect.context import FlowRunContext

from sft_core.artifacts import Manifest
from sft_core.lineage.card import model_card
from sft_core.register import Verdict
from sft_core.register.stored import stored_manifest
from sft_core.steps import Retraining
from tasks.registry import JUDGED_AGAINST, MERGED, PROMOTE, RUN, VERDICT
from tasks.run_step import Job
from tasks.tracking import client

SERVING_REQUIREMENTS = ("torch", "transformers", "accelerate")
WEIGHTS = (".safetensors", ".bin")
MODEL, ADAPTER = "model", "adapter"
"""Folders: of the model's files in the logged model; of the adapter in the run's artifacts."""
INPUT_EXAMPLE = {"messages": [{"role": "user", "content": "Hello."}], "max_tokens": 32}
DIGEST_CHARACTERS = 32
"""MLflow keeps 36 of a data set's digest."""


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A merged model to log: its files, what identifies it, the registered model's name, its tokens an answer."""

    path: Path
    fingerprint: str
    name: str
    max_new_tokens: int


def log_merged(job: Job, run: Retraining) -> str:
    """Id of the logged model that holds this job's merged model."""
    recipe = job.recipe
    folder = ModelFolder(
        run.folder("merge"), job.plan["merge"].fingerprint, recipe.model_name, recipe.evaluate.max_new_tokens
    )
    return log_folder(folder, job.part.run_id)


def log_folder(folder: ModelFolder, run_id: str) -> str:
    """Id of the logged model that holds these files: found again in the run's experiment, else uploaded."""
    experiment_id = client().get_run(run_id).info.experiment_id
    query = f"tags.`{MERGED}` = '{folder.fingerprint}' AND status = 'READY'"
    found = client().search_logged_models([experiment_id], filter_string=query)
    if found:
        return str(found[0].model_id)
    tags = {MERGED: folder.fingerprint}
    created = client().create_logged_model(experiment_id, name=MODEL, source_run_id=run_id, tags=tags)
    for path in sorted(folder.path.rglob("*")):
        if path.suffix in WEIGHTS:
            below = path.parent.relative_to(folder.path).as_posix()
            client().log_model_artifact(created.model_id, str(path), f"{MODEL}/{below}".removesuffix("/."))
    with tempfile.TemporaryDirectory(prefix="sft-register-") as scratch:
        described = Model(
            artifact_path=created.artifact_location,
            model_uuid=created.model_id,
            run_id=run_id,
            model_id=created.model_id,
        )
        client().log_model_artifacts(created.model_id, str(_describe(folder, described, Path(scratch))))
    client().finalize_logged_model(created.model_id, "READY")
    client().log_outputs(run_id, [LoggedModelOutput(created.model_id, step=0)])
    return str(created.model_id)


def create_version(job: Job, run: Retraining, model_id: str, verdict: Verdict, against: str) -> str:
    """Register the logged model; the number. To be called under the registry's lock."""
    _log_inputs(job, run)
    if "convert" in job.plan.steps:
        client().log_artifacts(job.part.run_id, str(run.folder("convert")), ADAPTER)
    tags = _tags(job, run) | verdict_tags(verdict, against)
    version = mlflow.register_model(f"models:/{model_id}", job.recipe.model_name, tags=tags)
    write_card(job, run, str(version.version), verdict)
    return str(version.version)


def discard_copy(model_name: str, number: str, model_id: str) -> None:
    """Delete a logged model that lost a race: the version holds another copy."""
    if client().get_model_version(model_name, number).source != f"models:/{model_id}":
        client().delete_logged_model(model_id)


def write_card(job: Job, run: Retraining, number: str, verdict: Verdict) -> None:
    """The version's description: what it is, and why it was or was not promoted."""
    card = model_card(job.recipe, job.plan, _manifests(job, run), verdict.words)
    client().update_model_version(job.recipe.model_name, number, description=card)


def verdict_tags(verdict: Verdict, against: str) -> dict[str, str]:
    """What a judgement says of a version; a retry may be judged anew."""
    return {VERDICT: verdict.words, PROMOTE: str(verdict.promote).lower(), JUDGED_AGAINST: against}


def _describe(folder: ModelFolder, described: Any, scratch: Path) -> Path:
    """Write everything but the weights, as MLflow lays a model out."""
    light, out = scratch / folder.name, scratch / "out"
    shutil.copytree(folder.path, light, ignore=shutil.ignore_patterns(*(f"*{suffix}" for suffix in WEIGHTS)))
    readme = light / "README.md"
    mlflow.transformers.save_model(
        str(light),
        str(out),
        mlflow_model=described,
        task="llm/v1/chat",
        model_card=ModelCard(readme.read_text("utf-8") if readme.is_file() else folder.name),  # else asked of the hub
        input_example=INPUT_EXAMPLE,
        # The template writes every special token: the pipeline's tokenizer must not add a second BOS to its text.
        model_config={"add_special_tokens": False, "max_new_tokens": folder.max_new_tokens},
        pip_requirements=[f"{package}=={installed(package).partition('+')[0]}" for package in SERVING_REQUIREMENTS],
    )
    (out / "LICENSE.txt").unlink(missing_ok=True)  # says only that none was found at the scratch folder's path
    described.flavors["transformers"]["source_model_name"] = folder.name  # not a path of this machine
    described.model_size_bytes = sum(path.stat().st_size for path in folder.path.rglob("*") if path.is_file())
    described.save(str(out / "MLmodel"))
    return out


def _log_inputs(job: Job, run: Retraining) -> None:
    """Raw data sets and conversations as inputs of the run that made the version."""
    inputs = []
    sources = [(d, "training") for d in job.recipe.datasets] + [(d, "evaluation") for d in job.recipe.eval_datasets]
    for index, (source, context) in enumerate(sources):
        manifest = stored_manifest(run, f"fetch/{index}")
        inputs.append(_input(source.path, manifest, context, source.model_dump_json()))
    conversations = stored_manifest(run, "normalize")
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
    reports = {which: stored_manifest(run, f"evaluate/{which}").facts["metrics"] for which in ("tuned", "base")}
    flow = FlowRunContext.get()
    tags = {
        MERGED: plan["merge"].fingerprint,
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
