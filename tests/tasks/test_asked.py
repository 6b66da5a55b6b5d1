"""Who asked for a run: a deployment's may name the project's files, one of this process whatever its user can read."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.flow_engine import run_flow
from prefect.testing.utilities import prefect_test_harness

from sft_core.errors import RecipeError
from sft_core.lineage.ancestry import Recorded
from sft_core.lineage.reproduction import reproduce
from sft_core.store import Store
from sft_core.trust import MODULES, PATHS, PROJECT, REMOTE_CODE
from tasks import models, tracking
from tasks.asked import plan_asked, resolve_asked
from tasks.registry import RUN, RegisteredVersion

pytestmark = pytest.mark.slow

START_SECONDS = 300
RECIPE = "name: orders\nbase_model: {path: base}\ndatasets: [{path: rows.jsonl}]\n"
STEP: dict[str, Any] = {"key": "pack", "fingerprint": "0" * 64, "parts": {}, "inputs": {"conversations": "1" * 64}}
PLAN: dict[str, Any] = {"steps": {"pack": STEP}, "chat_template": "x", "base_commit": None, "notes": []}


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


def test_a_plan_that_a_retraining_made_is_taken() -> None:
    assert plan_asked(PLAN)["pack"].fingerprint == "0" * 64
    assert plan_asked({**PLAN, "base_commit": "a" * 40}).base_commit == "a" * 40


@pytest.mark.parametrize(
    "plan",
    [
        {**PLAN, "steps": {"pack": {**STEP, "fingerprint": "../../elsewhere"}}},
        {**PLAN, "steps": {"pack": {**STEP, "inputs": {"conversations": "../x"}}}},
        {**PLAN, "steps": {"../pack": {**STEP, "key": "../pack"}}},
        {**PLAN, "steps": {"pack": {**STEP, "key": "train"}}},
        {**PLAN, "base_commit": "refs/pr/1"},
        {**PLAN, "steps": []},
        {"steps": {}},
    ],
)
def test_a_plan_that_names_anything_but_artifacts_is_refused(plan: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="^plan: this is none that a retraining made"):
        plan_asked(plan)


def test_the_registry_has_no_code_of_a_model_run(
    empty_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That a version's recipe trusted its base's code is MLflow's word, not that of who promotes or reproduces it."""
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.delenv(REMOTE_CODE, raising=False)
    tracking.client.cache_clear()
    try:
        experiment = tracking.client().create_experiment("orders", artifact_location=(tmp_path / "files").as_uri())
        run_id = tracking.client().create_run(experiment).info.run_id
        base = {"path": "evil/model", "trust_remote_code": True}
        recipe = {"name": "orders", "base_model": base, "datasets": [{"path": "rows.jsonl"}]}
        tracking.client().log_dict(run_id, recipe, "recipe.json")
        tracking.client().log_dict(run_id, PLAN, "plan.json")
        version = RegisteredVersion("1", "0" * 64, (), {RUN: run_id})
        with pytest.raises(RecipeError, match=r"^orders version 1 was made with base_model.trust_remote_code, and"):
            models._check("orders", version)
    finally:
        tracking.client.cache_clear()
    store = Store(str(tmp_path / "store"))
    with pytest.raises(RecipeError, match=r"^the recorded recipe sets base_model.trust_remote_code, and"):
        next(reproduce(Recorded(recipe, PLAN, {}), store, store))
