"""Waiting for MLflow: what nobody answers is tried again within a bound, what is answered is passed on at once."""

import socket
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from sft_core.plan import Plan, PlannedStep
from sft_core.recipe import resolve
from tasks import patience, tracking
from tasks.patience import TrackingError, patiently

LONG = "3600"
"""Patience, in seconds, that a test would not outlive."""


@pytest.fixture(autouse=True)
def one_try(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """MLflow's client gives up at once; what is set here ends with the test."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(patience, "RETRY_SECONDS", 0.01)
    tracking.client.cache_clear()
    yield
    mlflow.set_tracking_uri(None)
    tracking.client.cache_clear()


@pytest.fixture
def nobody() -> Iterator[str]:
    """An address that refuses connections: bound, so that nobody else listens there, but not listening."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"


def test_a_server_that_comes_back_is_waited_for(nobody: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(patience.PATIENCE, LONG)
    away, back = MlflowClient(nobody), MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    clients = iter([away, away, back])
    assert patiently(lambda name: next(clients).create_experiment(name), "orders") == "1"
    assert back.get_experiment_by_name("orders") is not None


def test_a_server_that_stays_away_is_an_error_that_says_which(nobody: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(patience.PATIENCE, "0.05")
    mlflow.set_tracking_uri(nobody)
    with pytest.raises(TrackingError, match=f"MLflow at {nobody} has not answered for 0 s"):
        tracking.client().get_experiment_by_name("orders")


def test_an_answer_that_says_no_is_passed_on_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(patience.PATIENCE, LONG)
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    with pytest.raises(MlflowException, match="no-such-run"):
        tracking.client().get_run("no-such-run")


def test_work_that_fails_while_mlflow_is_away_keeps_its_own_error(
    nobody: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(patience.PATIENCE, LONG)
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    recipe = resolve({"name": "t", "base_model": {"path": "b"}, "datasets": [{"path": "d"}]})
    steps = {key: PlannedStep(key, "a" * 64, {}, {}) for key in ("merge", "evaluate/tuned", "evaluate/base")}

    def work() -> None:
        with tracking.part_run("train", recipe, Plan(steps, "template", None)):
            mlflow.set_tracking_uri(nobody)
            raise ValueError("out of memory")

    with pytest.raises(ValueError, match="out of memory"):
        work()
