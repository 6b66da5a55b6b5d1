"""The files of a merged model where MLflow can load them: copied once, or described where they lie in a bucket.

In: a model folder. Out: a source to register: `models:/<id>` of a logged model, or the artifact's URL. Weights are
uploaded file by file, never loaded; the description (`MLmodel`) comes last, so one without weights is never found.
"""

import logging
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

import mlflow
from huggingface_hub import ModelCard
from mlflow.entities import LoggedModel, LoggedModelOutput, LoggedModelStatus
from mlflow.models import Model
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from sft_core.artifacts import Artifact
from sft_core.errors import RegistryError
from sft_core.lease import LEASE_SECONDS
from sft_core.store import Store
from tasks import served_chat
from tasks.patience import first_line
from tasks.registry import MERGED
from tasks.registry_lock import upload_lock
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
    """Source of the logged model that holds these files: found again in the run's experiment, else uploaded. What a
    process that was killed left half there is deleted."""
    experiment_id = client().get_run(run_id).info.experiment_id
    query = f"tags.`{MERGED}` = '{folder.fingerprint}'"  # a status cannot be asked for: MLflow stores numbers
    with upload_lock(folder.fingerprint):  # nobody else is at it: what is not ready is nobody's
        for found in client().search_logged_models([experiment_id], filter_string=query):
            if found.status == LoggedModelStatus.READY:
                return f"{COPY}{found.model_id}"
            discard(found)
        tags = {MERGED: folder.fingerprint}
        created = client().create_logged_model(experiment_id, name=MODEL, source_run_id=run_id, tags=tags)
        try:
            _upload(folder, created, run_id)
        except BaseException:  # also the signal of a cancellation: raised again below
            discard(created)
            raise
    return f"{COPY}{created.model_id}"


def discard(model: LoggedModel) -> None:
    """Delete a logged model that no version holds: its files, then itself. What cannot be deleted now is found by
    `half_uploads` again."""
    try:
        get_artifact_repository(model.artifact_location).delete_artifacts()
        client().delete_logged_model(model.model_id)
    except Exception as error:  # noqa: BLE001 - every place of artifacts has its own errors
        logging.getLogger(__name__).warning("%s%s stays for now: %s", COPY, model.model_id, first_line(error))


def half_uploads(before: datetime) -> Iterator[LoggedModel]:
    """Copies of merged models, in any experiment, that were begun and not touched since `before`."""
    for experiment in _pages(client().search_experiments):
        for model in _pages(partial(client().search_logged_models, [experiment.experiment_id])):
            touched = datetime.fromtimestamp(model.last_updated_timestamp / 1000, UTC)
            if model.status != LoggedModelStatus.READY and MERGED in model.tags and touched < before:
                yield model


def discard_half_upload(model: LoggedModel) -> bool:
    """Delete one of `half_uploads`; False if a process is at it."""
    try:
        with upload_lock(model.tags[MERGED], wait_seconds=2 * LEASE_SECONDS):
            now = client().get_logged_model(model.model_id)
            if now.status != LoggedModelStatus.READY:
                discard(now)
                return True
    except RegistryError:
        logging.getLogger(__name__).info("%s%s is being uploaded", COPY, model.model_id)
    return False


def _pages(ask: Callable[..., Any]) -> Iterator[Any]:
    token = None
    while True:
        page = ask(page_token=token)
        yield from page
        token = page.token
        if not token:
            return


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
        discard(client().get_logged_model(source.removeprefix(COPY)))


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
