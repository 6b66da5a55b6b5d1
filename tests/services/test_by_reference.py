"""`register.by_reference`: a version that is where the store's bucket has it, loaded as consumers load any other."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow.tracking import MlflowClient

from sft_core.artifacts import Artifact, Manifest
from sft_core.errors import ModelError
from sft_core.load_check import check_loads
from sft_core.store import Store, list_files
from tasks.model_files import ModelFolder, discard_copy, refer_to
from tasks.model_version import create
from tasks.tracking import download_model
from tests.services.s3 import BUCKET, S3Server, s3
from tests.tasks.models_project import connected
from tests.tasks.test_models_consumers import QUESTION, URI, merged, record, trained_ids

__all__ = ["merged", "s3", "trained_ids"]
FINGERPRINT = "f" * 64


@pytest.fixture(scope="module")
def manifest(merged: Path) -> Manifest:
    """Of the merged artifact."""
    return Manifest(
        kind="MergedModel",
        step="merge",
        name="served:merge",
        fingerprint=FINGERPRINT,
        parts={},
        inputs={},
        files=list_files(merged),
        ledger={},
        facts={},
        versions={},
        device="cpu",
        started="2026-11-24T00:00:00+00:00",
        took_seconds=1.0,
    )


@pytest.fixture(scope="module")
def artifact(s3: S3Server, merged: Path, manifest: Manifest) -> tuple[Store, Artifact]:
    """The merged model in the bucket, as the step writes it."""
    store = Store(f"s3://{BUCKET}/store")
    store.publish(merged, manifest)
    return store, store.artifact("merge", FINGERPRINT)


@pytest.fixture(scope="module")
def client(
    artifact: tuple[Store, Artifact], merged: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[MlflowClient]:
    """A registry whose champion is that artifact."""
    folder = tmp_path_factory.mktemp("registry")
    for client in connected(folder / "mlflow.db"):
        experiment = client.create_experiment("served", artifact_location=(folder / "artifacts").as_uri())
        run_id = client.create_run(experiment).info.run_id
        for _ in range(2):  # a retry finds the description there
            source = refer_to(ModelFolder(merged, FINGERPRINT, "served", 5), *artifact)
        number = create("served", source, run_id, {"sft.merged_fingerprint": FINGERPRINT})
        client.set_registered_model_alias("served", "champion", number)
        discard_copy("served", number, source)  # a reference is nobody's copy
        yield client
        assert not list((folder / "artifacts").rglob("*.safetensors")), "MLflow was given a copy"


def test_the_version_is_the_artifact(client: MlflowClient, artifact: tuple[Store, Artifact]) -> None:
    version = client.get_model_version_by_alias("served", "champion")
    assert version.source == f"s3://{BUCKET}/store/merge/{FINGERPRINT}"
    store, _ = artifact
    assert store.find("merge", FINGERPRINT) is not None  # complete still, for all that lies beside it
    names = store.files.walk(store.address("merge", FINGERPRINT))
    assert sum(name.endswith(".safetensors") for name in names) == 1


def test_pyfunc(client: MlflowClient, trained_ids: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = mlflow.pyfunc.load_model(URI)
    seen = record(loaded.get_raw_model().model, monkeypatch)
    (answer,) = loaded.predict({"messages": QUESTION, "max_tokens": 3})
    assert seen == [trained_ids]
    assert answer["model"] == "served"
    assert loaded.metadata.signature is not None
    assert loaded.input_example["messages"]


def test_transformers_flavor(client: MlflowClient, trained_ids: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline: Any = mlflow.transformers.load_model(URI)
    seen = record(pipeline.model, monkeypatch)
    pipeline(QUESTION, max_new_tokens=2)
    assert seen == [trained_ids]


def test_what_promotion_checks_is_what_lies_in_the_bucket(
    client: MlflowClient, artifact: tuple[Store, Artifact], manifest: Manifest, merged: Path
) -> None:
    check_loads(download_model(URI), manifest)
    files, path = artifact[0].files, f"{artifact[0].address('merge', FINGERPRINT)}/model.safetensors"
    whole = files.cat_file(path)
    assert whole == (merged / "model.safetensors").read_bytes()
    files.write(path, whole[:-1] + b"\x00")
    with pytest.raises(ModelError, match="not the files that were registered: .*model.safetensors"):
        check_loads(download_model(URI), manifest)
    files.write(path, whole)
