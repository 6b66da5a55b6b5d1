"""The files of a merged model where MLflow can load them: copied once, or described where they lie in a bucket.

In: a model folder. Out: a source to register: `models:/<id>` of a logged model, or the artifact's URL. Weights are
uploaded file by file, never loaded; the description (`MLmodel`) comes last, so one without weights is never found.
"""

import shutil
import tempfile
import uuid
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

import mlflow
from huggingface_hub import ModelCard
from mlflow.entities import LoggedModel, LoggedModelOutput, LoggedModelStatus
from mlflow.exceptions import MlflowException
from mlflow.models import Model

from sft_core.artifacts import Artifact
from sft_core.store import Store
from tasks import served_chat
from tasks.registry import MERGED
from tasks.tracking import client

SERVING_REQUIREMENTS = ("torch", "transformers", "accelerate")
WEIGHTS = (".safetensors", ".bin")
MODEL, DESCRIPTION = "model", "MLmodel"
"""Folder of the model's files in the logged model; MLflow's file that says how to load it."""
INPUT_EXAMPLE = {"messages": [{"role": "user", "content": "Hello."}], "max_tokens": 32}
LOADER = "sft_served_chat"
"""Name of `tasks/served_chat.py` in a logged model."""
COPY = "models:/"
"""Start of a source that is a copy of this project's."""


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A merged model to log: its files, what identifies it, the registered model's name, its tokens an answer."""

    path: Path
    fingerprint: str
    name: str
    max_new_tokens: int


def log_folder(folder: ModelFolder, run_id: str) -> str:
    """Source of the logged model that holds these files: found again in the run's experiment, else uploaded."""
    experiment_id = client().get_run(run_id).info.experiment_id
    query = f"tags.`{MERGED}` = '{folder.fingerprint}'"  # a status cannot be asked for: MLflow stores numbers
    found = [
        m
        for m in client().search_logged_models([experiment_id], filter_string=query)
        if m.status == LoggedModelStatus.READY
    ]
    if found:
        return f"{COPY}{found[0].model_id}"
    tags = {MERGED: folder.fingerprint}
    created = client().create_logged_model(experiment_id, name=MODEL, source_run_id=run_id, tags=tags)
    try:
        _upload(folder, created, run_id)
    except BaseException:  # also the signal of a cancellation: raised again below
        with suppress(MlflowException):  # what is half there is no model: `mlflow gc` may have it
            client().delete_logged_model(created.model_id)
        raise
    return f"{COPY}{created.model_id}"


def _upload(folder: ModelFolder, created: LoggedModel, run_id: str) -> None:
    """Weights first, the description last."""
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
    client().finalize_logged_model(created.model_id, LoggedModelStatus.READY)
    client().log_outputs(run_id, [LoggedModelOutput(created.model_id, step=0)])


def refer_to(folder: ModelFolder, store: Store, artifact: Artifact) -> str:
    """URL of the merged artifact, beside whose files MLflow's description is put; no weight is copied."""
    address = store.address("merge", artifact.fingerprint)
    if store.files.size(f"{address}/{DESCRIPTION}") is not None:
        return artifact.uri
    with tempfile.TemporaryDirectory(prefix="sft-register-") as scratch:
        out = _describe(folder, Model(artifact_path=artifact.uri, model_uuid=uuid.uuid4().hex), Path(scratch))
        shutil.rmtree(out / MODEL)  # the artifact has these files at its root
        described = Model.load(str(out))
        described.flavors["transformers"]["model_binary"] = "."
        described.flavors["python_function"]["model_binary"] = "."
        described.save(str(out / DESCRIPTION))
        names = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
        for name in sorted(names, key=lambda name: name == DESCRIPTION):  # last
            store.files.put_file(out / name, f"{address}/{name}")
    return artifact.uri


def discard_copy(model_name: str, number: str, source: str) -> None:
    """Delete a logged model that lost a race: the version holds another copy."""
    if source.startswith(COPY) and client().get_model_version(model_name, number).source != source:
        client().delete_logged_model(source.removeprefix(COPY))


def _describe(folder: ModelFolder, described: Any, scratch: Path) -> Path:
    """Write everything but the weights, as MLflow lays a model out."""
    light, out = scratch / folder.name, scratch / "out"
    shutil.copytree(folder.path, light, ignore=shutil.ignore_patterns(*(f"*{suffix}" for suffix in WEIGHTS)))
    readme, loader = light / "README.md", shutil.copyfile(served_chat.__file__, scratch / f"{LOADER}.py")
    mlflow.transformers.save_model(
        str(light),
        str(out),
        mlflow_model=described,
        task="llm/v1/chat",
        model_card=ModelCard(readme.read_text("utf-8") if readme.is_file() else folder.name),  # else asked of the hub
        input_example=INPUT_EXAMPLE,
        code_paths=[str(loader)],
        # The template writes every special token: the pipeline's tokenizer must not add a second BOS to its text.
        model_config={"add_special_tokens": False, "max_new_tokens": folder.max_new_tokens},
        pip_requirements=[f"{package}=={installed(package).partition('+')[0]}" for package in SERVING_REQUIREMENTS],
    )
    (out / "LICENSE.txt").unlink(missing_ok=True)  # says only that none was found at the scratch folder's path
    described.flavors["python_function"]["loader_module"] = LOADER
    described.flavors["transformers"]["source_model_name"] = folder.name  # not a path of this machine
    described.model_size_bytes = sum(path.stat().st_size for path in folder.path.rglob("*") if path.is_file())
    described.save(str(out / "MLmodel"))
    return out
