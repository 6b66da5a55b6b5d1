"""A process that is killed while it copies a merged model into MLflow: what it left is found, and goes."""

import signal
import sqlite3
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from mlflow.entities import LoggedModelStatus
from mlflow.tracking import MlflowClient

from tasks.model_files import ModelFolder, discard_half_upload, half_uploads, log_folder
from tasks.registry_lock import upload_lock
from tests.tasks.models_project import ROOT, empty_registry, environment

__all__ = ["empty_registry"]
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


@pytest.fixture
def run_id(empty_registry: MlflowClient, tmp_path: Path) -> str:
    experiment = empty_registry.create_experiment("served", artifact_location=(tmp_path / "artifacts").as_uri())
    return str(empty_registry.create_run(experiment).info.run_id)


def kill_an_upload(tiny_model: Path, run_id: str, tmp_path: Path) -> None:
    """A process of its own uploads the weights and is killed."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tiny_model), FINGERPRINT, run_id],
        cwd=ROOT,
        env=environment(tmp_path, tmp_path / "mlflow.db"),
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL


def weights(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "artifacts").rglob("*.safetensors"))


def later() -> datetime:
    return datetime.now(UTC) + timedelta(minutes=1)


def test_the_next_run_deletes_what_a_killed_one_left_and_uploads_anew(
    empty_registry: MlflowClient, tiny_model: Path, run_id: str, tmp_path: Path
) -> None:
    kill_an_upload(tiny_model, run_id, tmp_path)
    (left,) = weights(tmp_path)
    (half,) = half_uploads(later())
    assert half.status == LoggedModelStatus.PENDING
    source = log_folder(ModelFolder(tiny_model, FINGERPRINT, "served", 5), run_id)
    experiment = empty_registry.get_experiment_by_name("served")
    (model,) = empty_registry.search_logged_models([experiment.experiment_id])
    assert (source, model.status) == (f"models:/{model.model_id}", LoggedModelStatus.READY)
    assert not left.exists()
    assert len(weights(tmp_path)) == 1
    assert list(half_uploads(later())) == []
    assert log_folder(ModelFolder(tiny_model, FINGERPRINT, "served", 5), run_id) == source


def test_store_gc_finds_and_removes_half_a_copy_of_yesterday(
    empty_registry: MlflowClient, tiny_model: Path, run_id: str, tmp_path: Path
) -> None:
    kill_an_upload(tiny_model, run_id, tmp_path)

    def gc(*options: str) -> str:
        command = [sys.executable, "-m", "cli.main", "store", "gc", str(tmp_path / "store"), *options]
        settings = environment(tmp_path, tmp_path / "mlflow.db")
        done = subprocess.run(command, cwd=tmp_path, env=settings, capture_output=True, text=True, timeout=SECONDS)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "half a copy" not in gc("--delete")  # it may be under way
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        database.execute("UPDATE logged_models SET last_updated_timestamp_ms = last_updated_timestamp_ms - 100000000")
    assert "can go; --delete removes it" in gc()
    assert len(weights(tmp_path)) == 1
    assert gc("--delete").rstrip().endswith("removed")
    assert weights(tmp_path) == []
    assert list(half_uploads(later())) == []


def test_an_upload_that_is_under_way_is_left_alone(
    empty_registry: MlflowClient, tiny_model: Path, run_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sft_core import lease
    from tasks import model_files

    kill_an_upload(tiny_model, run_id, tmp_path)
    monkeypatch.setattr(model_files, "LEASE_SECONDS", 0.2)
    monkeypatch.setattr(lease, "LOOK_SECONDS", 0.1)
    monkeypatch.setattr(lease, "SAY_SECONDS", 0.1)
    (half,) = half_uploads(later())
    with upload_lock(FINGERPRINT):
        assert not discard_half_upload(half)
    assert len(weights(tmp_path)) == 1
    assert discard_half_upload(half)
    assert weights(tmp_path) == []
