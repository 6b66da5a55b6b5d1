"""Tasks on a real Prefect server: what a run that was asked for from it may name, and the progress of a training."""

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.flow_engine import run_flow
from prefect.testing.utilities import prefect_test_harness

from sft_core.errors import RecipeError
from sft_core.trust import MODULES, PATHS, PROJECT
from tasks.asked import resolve_asked
from tasks.train import LEAST_SECONDS, Progress

pytestmark = pytest.mark.slow

START_SECONDS = 300
RECIPE = "name: orders\nbase_model: {path: base}\ndatasets: [{path: rows.jsonl}]\n"


@flow
def asks(recipe: str, template: str) -> str:
    """Takes its parameters as `retrain` does."""
    return str(resolve_asked(recipe, {"pack": {"chat_template": template}}).pack.chat_template)


@pytest.fixture(scope="module")
def server() -> Iterator[None]:
    with prefect_test_harness(server_startup_timeout=START_SECONDS):
        yield


def run_deployed(parameters: dict[str, Any]) -> Any:
    """The flow as a worker's process runs it: by a flow run that the server made of a deployment."""
    with get_client(sync_client=True) as client:
        deployment: UUID = client.create_deployment(client.create_flow(asks), "asks")
        run = client.create_flow_run_from_deployment(deployment, parameters=parameters)
    return run_flow(asks, flow_run=run, parameters=parameters)


def test_a_deployments_run_reads_the_projects_files_alone(
    server: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in (MODULES, PATHS, PROJECT):
        monkeypatch.delenv(variable, raising=False)
    outside = tmp_path / "secret.jinja"
    outside.write_text("swordfish")
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    for file in ("recipe.yaml", "../recipe.yaml"):
        Path(file).write_text(RECIPE)
    Path("mine.jinja").write_text("x")
    rule = ": a run that was asked for from the server may name "
    with pytest.raises(RecipeError, match=f"^pack.chat_template{rule}"):
        run_deployed({"recipe": "recipe.yaml", "template": str(outside)})
    with pytest.raises(RecipeError, match=f"^recipe{rule}"):
        run_deployed({"recipe": f"{tmp_path}/recipe.yaml", "template": "chatml"})
    assert run_deployed({"recipe": "recipe.yaml", "template": "mine.jinja"}) == "mine.jinja"
    assert asks(f"{tmp_path}/recipe.yaml", str(outside)) == str(outside)  # started here: its user's own word


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """What flow runs log from here on."""
    words: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: words.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("prefect.flow_runs")
    logger.addHandler(handler)
    yield words
    logger.removeHandler(handler)


def test_the_progress_artifact_moves_now_and_then_and_ends_at_100(server: None, logged: list[str]) -> None:
    before, first, at_once, later, ended, reused = shown_by_a_flow()
    assert before == reused[1:] == []
    assert first == at_once == [["train-my-run", 25.0, "training My_Run: step 1/4  loss 3.0"]]
    assert later == [["train-my-run", 75.0, "training My_Run: step 3/4  loss 1.0"]]
    assert ended == reused == [["train-my-run", 100.0, "training My_Run: step 3/4  loss 1.0"]]
    assert [words for words in logged if words.startswith("progress not shown: ")]


def shown_by_a_flow() -> list[list[Any]]:
    """Key, progress and description of all artifacts, after each thing that happens."""
    seen: list[list[Any]] = []

    def look() -> None:
        artifacts = get_client(sync_client=True).read_artifacts()
        shown = [artifact for artifact in artifacts if artifact.key is not None]  # flow runs' results have none
        seen.append([[artifact.key, artifact.data, artifact.description] for artifact in shown])

    @flow
    def train() -> None:
        progress = Progress("My_Run")
        progress("note: attention")
        look()
        progress("step 1/4  loss 3.0")
        look()
        progress._shown_at = time.monotonic()  # however long the server took
        progress("step 2/4  loss 2.0")
        look()
        progress._shown_at -= LEAST_SECONDS
        progress("step 3/4  loss 1.0")
        look()
        progress.end()
        look()
        Progress("reused").end()
        look()
        progress._artifact = uuid4()  # the server knows it no more
        progress.end()

    train()
    return seen
