"""A run with too few new rows ends as skipped, with the reason in the UI and in MLflow; in doubt it goes on."""

from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient
from prefect.logging import disable_run_logger

from sft_core.plan import Plan, plan_recipe
from sft_core.recipe import Recipe, resolve
from sft_core.steps import Retraining, run_step
from sft_core.store import Store
from tasks.schedule import reason_to_skip
from tests.commands import Commands
from tests.tasks.models_project import built_project, registry, write_rows

__all__ = ["built_project", "registry"]
pytestmark = pytest.mark.slow


@pytest.fixture
def reason(built_project: Path, registry: MlflowClient, tmp_path: Path) -> Any:
    """What is decided for the rows 0 to `last` less one, with overrides; their conversations are in the store."""

    def decide(last: int, store: str | None = None, **overrides: Any) -> str | None:
        write_rows(tmp_path, range(last))
        source = {"path": str(tmp_path / "rows.jsonl"), "map_fn": f"{built_project}/reader.py:read"}
        recipe = resolve(built_project / "recipe.yaml", {"datasets": [source], **overrides})
        recipe = recipe if store is None else resolve({**recipe.as_dict(), "store": store})
        plan = plan_recipe(recipe)
        prepare(recipe, plan)
        with disable_run_logger():
            return reason_to_skip.fn(recipe, plan)

    return decide


def prepare(recipe: Recipe, plan: Plan) -> None:
    run = Retraining(recipe, plan, Store(recipe.store), lambda _: None)
    for key in ("fetch/0", "normalize"):
        run_step(run, key)


def test_few_new_rows_are_a_reason_and_enough_are_none(reason: Any) -> None:
    steps = {"max_steps": 8}  # as the champion, version 2: trained on rows 5 to 69
    assert reason(90, train=steps, schedule={"min_new_rows": 5}) is None
    words = reason(90, train=steps, schedule={"min_new_rows": 40})
    assert "new rows since version 2 of orders; schedule.min_new_rows is 40" in words
    assert 10 <= int(words.split()[0]) <= 25  # rows 0 to 4 and 70 to 89, less those held out
    assert reason(60, train=steps) is None  # 0 never skips


def test_a_changed_recipe_or_conversations_that_are_gone_are_no_reason(reason: Any, tmp_path: Path) -> None:
    assert reason(60, train={"max_steps": 9}, schedule={"min_new_rows": 40}) is None
    schedule = {"min_new_rows": 40}
    assert reason(60, train={"max_steps": 8}, schedule=schedule) is not None
    assert reason(60, store=str(tmp_path / "store"), train={"max_steps": 8}, schedule=schedule) is None


def test_the_run_ends_as_skipped_in_prefect_and_in_mlflow(
    built_project: Path, registry: MlflowClient, tmp_path: Path, commands: Commands
) -> None:
    write_rows(tmp_path, range(5, 72))
    text = (built_project / "recipe.yaml").read_text().replace(f"{built_project}/rows.jsonl", f"{tmp_path}/rows.jsonl")
    (tmp_path / "recipe.yaml").write_text(text.replace("steps: 3", "steps: 8") + "schedule: {min_new_rows: 5}\n")
    done = commands.run(tmp_path, "run", "recipe.yaml", MLFLOW_TRACKING_URI=f"sqlite:///{tmp_path}/mlflow.db")
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "Finished in state Skipped('" in said
    told = next(line for line in done.stdout.splitlines() if line.startswith("orders  skipped, nothing trained: "))
    assert "new rows since version 2 of orders; schedule.min_new_rows is 5" in told
    assert "rows      67 in = " in done.stdout
    assert "held out  " not in done.stdout  # no scores: nothing was evaluated
    assert "anyway    the same command with --set schedule.min_new_rows=0" in done.stdout
    experiment = registry.get_experiment_by_name("orders")
    runs = registry.search_runs([experiment.experiment_id], "tags.`sft.skipped` LIKE '%min_new_rows is 5%'")
    assert [run.data.tags["sft.part"] for run in runs] == ["retraining"]
    assert runs[0].info.status == "FINISHED"
    assert len(registry.search_model_versions("name='orders'")) == 2
