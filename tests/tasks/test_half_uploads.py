"""A process that is killed while it copies a merged model into MLflow: what it left is found, and goes."""

import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from mlflow.entities import LoggedModelStatus
from typer.testing import CliRunner

from cli.store import app
from tasks import tracking
from tasks.model_files import ModelFolder, discard_half_upload, half_uploads, log_folder
from tasks.registry_lock import upload_lock
from tests.tasks.models_project import ROOT, connected, environment

pytestmark = pytest.mark.slow
SECONDS = 300
FINGERPRINT = "f" * 64
KILLED = """
import os, sys
from pathlib import Path
from mlflow.tracking import MlflowClient
from tasks.model_files import ModelFolder, log_folder
MlflowClient.log_model_artifacts = lambda *_, **__: os.kill(os.getpid(), 9)  # behind the weights
log_folder(ModelFolder(Path(sys.argv[1]), sys.argv[2], "served", 5), sys.argv[3])
"""


@dataclass(frozen=True)
class Place:
    """A registry that nothing was registered in, its artifacts below `folder`, and the run of an upload."""

    folder: Path
    run_id: str


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, empty_database: Path, tiny_model: Path) -> Place:
    """Where a process of its own has uploaded the weights and was killed; as it is, in `folder`, and kept in `kept`."""
    folder = tmp_path_factory.mktemp("killed") / "place"
    folder.mkdir()
    for client in connected(shutil.copyfile(empty_database, folder / "mlflow.db")):
        experiment = client.create_experiment("served", artifact_location=(folder / "artifacts").as_uri())
        run_id = str(client.create_run(experiment).info.run_id)
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tiny_model), FINGERPRINT, run_id],
        cwd=ROOT,
        env=environment(folder, folder / "mlflow.db"),
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    shutil.copytree(folder, folder.with_name("kept"))
    return Place(folder, run_id)


@pytest.fixture
def place(killed: Place, tmp_path: Path) -> Iterator[Place]:
    """That, as it was; the database is the test's own."""
    artifacts = killed.folder / "artifacts"
    shutil.rmtree(artifacts, ignore_errors=True)
    shutil.copytree(killed.folder.with_name("kept") / "artifacts", artifacts)
    for _ in connected(shutil.copyfile(killed.folder.with_name("kept") / "mlflow.db", tmp_path / "mlflow.db")):
        yield killed


def weights(place: Place) -> list[Path]:
    return sorted((place.folder / "artifacts").rglob("*.safetensors"))


def later() -> datetime:
    return datetime.now(UTC) + timedelta(minutes=1)


def test_the_next_run_deletes_what_a_killed_one_left_and_uploads_anew(place: Place, tiny_model: Path) -> None:
    (left,) = weights(place)
    (half,) = half_uploads(later())
    assert half.status == LoggedModelStatus.PENDING
    source = log_folder(ModelFolder(tiny_model, FINGERPRINT, "served", 5), place.run_id)
    client = tracking.client()
    experiment = client.get_experiment_by_name("served")
    (model,) = client.search_logged_models([experiment.experiment_id])
    assert (source, model.status) == (f"models:/{model.model_id}", LoggedModelStatus.READY)
    assert not left.exists()
    assert len(weights(place)) == 1
    assert list(half_uploads(later())) == []
    assert log_folder(ModelFolder(tiny_model, FINGERPRINT, "served", 5), place.run_id) == source


def test_store_gc_finds_and_removes_half_a_copy_of_yesterday(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")

    def gc(*options: str) -> str:
        done = CliRunner().invoke(app, ["gc", str(tmp_path / "store"), *options])
        assert done.exit_code == 0, done.output
        return done.stdout

    assert "half a copy" not in gc("--delete")  # it may be under way
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        database.execute("UPDATE logged_models SET last_updated_timestamp_ms = last_updated_timestamp_ms - 100000000")
    assert "can go; --delete removes it" in gc()
    assert len(weights(place)) == 1
    assert gc("--delete").rstrip().endswith("removed")
    assert weights(place) == []
    assert list(half_uploads(later())) == []


def test_an_upload_that_is_under_way_is_left_alone(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    from sft_core import lease
    from tasks import model_files

    monkeypatch.setattr(model_files, "LEASE_SECONDS", 0.2)
    monkeypatch.setattr(lease, "LOOK_SECONDS", 0.1)
    monkeypatch.setattr(lease, "SAY_SECONDS", 0.1)
    (half,) = half_uploads(later())
    with upload_lock(FINGERPRINT):
        assert not discard_half_upload(half)
    assert len(weights(place)) == 1
    assert discard_half_upload(half)
    assert weights(place) == []
