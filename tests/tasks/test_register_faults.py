"""A registry that fails in the middle of a registration: the next try ends as if nothing had happened."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow.tracking import MlflowClient
from prefect.logging import disable_run_logger

from tasks import register, tracking
from tasks.registry import find_champion, read_history, read_versions
from tasks.run_step import Job
from tests.tasks.models_project import built_project, empty_registry, recorded_job

__all__ = ["built_project", "empty_registry"]
pytestmark = pytest.mark.slow


class Fault(Exception):
    """The registry's, in the middle of something."""


@contextmanager
def failing(client: MlflowClient, name: str, nth: int) -> Iterator[None]:
    """The client's call `name` fails, the `nth` time and ever after."""
    real, calls = getattr(client, name), itertools.count(1)

    def call(*arguments: Any, **options: Any) -> Any:
        if next(calls) >= nth:
            raise Fault(name)
        return real(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client, name, call)
        yield


@pytest.fixture
def work(built_project: Path) -> tuple[Any, Any]:
    return recorded_job(built_project, "1")


FAULTS = [
    ("log_model_artifact", 1),  # the first weights
    ("log_model_artifacts", 1),  # MLflow's description
    ("finalize_logged_model", 1),
    ("log_inputs", 1),
    ("log_artifacts", 1),  # the adapter
    ("create_model_version", 1),
    ("set_logged_model_tags", 1),  # the logged model's link to its version
    ("update_model_version", 1),  # the card
    ("set_registered_model_tag", 1),  # the challenge
    ("set_model_version_tag", 2),  # the verdict
    ("set_registered_model_alias", 1),  # candidate
    ("set_registered_model_alias", 2),  # champion
    ("set_registered_model_tag", 2),  # the history
    ("set_model_version_tag", 1),  # settled: the champion has moved already
]


def test_a_registration_that_failed_anywhere_is_finished_by_the_next_try(
    work: tuple[Any, Any], empty_registry: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every fault in turn, each in a registry that the ones before left as they broke it; then none."""
    recipe, plan = work
    monkeypatch.setattr(register, "show_report", lambda *_: None)
    client = empty_registry
    with disable_run_logger(), tracking.part_run("publish", recipe, plan) as part:
        job = Job(recipe=recipe, plan=plan, part=part)
        for name, nth in FAULTS:
            with failing(client, name, nth), pytest.raises(Fault, match=name):
                register.register.fn(job, find_champion("orders"))
            assert len(read_versions("orders")) <= 1
        result = register.register.fn(job, find_champion("orders"))
    assert (result["version"], sorted(result["aliases"])) == ("1", ["candidate", "champion"])
    (version,) = read_versions("orders")
    assert version.settled
    assert version.tags["sft.judged_against"] == "none"
    assert [words.partition(":")[0] for _, words in read_history("orders")] == ["none -> 1"]
    assert [model.name for model in client.search_registered_models()] == ["orders"]  # the lock was given back
    experiment = client.get_experiment_by_name("orders")
    assert len(client.search_logged_models([experiment.experiment_id])) == 1  # what was half there is deleted
    assert Path(mlflow.artifacts.download_artifacts("models:/orders@champion")).is_dir()
