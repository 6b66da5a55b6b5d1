"""Waiting for MLflow: what nobody answers is tried again within a bound, what is answered is passed on at once."""

import socket
import traceback
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

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


def test_the_password_of_the_servers_address_is_in_no_error(nobody: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in ours, nor in those of MLflow and requests that led to it."""
    monkeypatch.setenv(patience.PATIENCE, "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", nobody.replace("://", "://me:swordfish@"))
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "")
    with pytest.raises(TrackingError, match=f"MLflow at {nobody} has not answered") as caught:
        tracking.client().get_experiment_by_name("orders")
    assert "swordfish" not in "".join(traceback.format_exception(caught.value))


def test_the_server_gets_that_password_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str | None] = []

    class Server(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # noqa: N802 - the library's name
            asked.append(self.headers["Authorization"])
            self.send_error(400, "Bad Request")

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Server) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:sword%2Ffish@127.0.0.1:{server.server_port}")
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "")
        with pytest.raises(MlflowException):
            tracking.client().get_experiment_by_name("orders")
        server.shutdown()
    assert asked == ["Basic bWU6c3dvcmQvZmlzaA=="]  # base64 of me:sword/fish


def test_an_answer_of_a_library_that_repeats_a_password_is_passed_on_without_it() -> None:
    def refuse() -> None:
        raise MlflowException("API request to http://me:swordfish@host/api failed with error code 403")

    with pytest.raises(MlflowException, match=r"API request to http://\*\*\*@host/api failed") as caught:
        patiently(refuse)
    assert "swordfish" not in caught.value.message


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
