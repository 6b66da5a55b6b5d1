"""What a plan that came from the server may name, and what a recipe that came from the registry may run. (What the run
of a deployment may name is in test_with_prefect.)"""

import shutil
from pathlib import Path
from typing import Any

import pytest

from sft_core.errors import RecipeError
from sft_core.lineage.ancestry import Recorded
from sft_core.lineage.reproduction import reproduce
from sft_core.store import Store
from sft_core.trust import REMOTE_CODE
from tasks import models, tracking
from tasks.asked import plan_asked
from tasks.registry import RUN, RegisteredVersion

pytestmark = pytest.mark.slow

STEP: dict[str, Any] = {"key": "pack", "fingerprint": "0" * 64, "parts": {}, "inputs": {"conversations": "1" * 64}}
PLAN: dict[str, Any] = {"steps": {"pack": STEP}, "chat_template": "x", "base_commit": None, "notes": []}


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
