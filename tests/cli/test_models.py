"""`sft models`: what is typed, what is printed, how it ends."""

import json
import shutil
import sqlite3
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from typer.testing import CliRunner, Result

from cli.main import app
from sft_core.errors import RegistryError
from tests.tasks.models_project import aliases, built_project, registry, row

__all__ = ["built_project", "registry"]
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _wide(registry: MlflowClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def models(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["models", *arguments])


def test_list_shows_versions_aliases_and_how_the_champion_changed() -> None:
    said = models("list").output
    assert "@candidate @champion" in said
    assert "none -> 1: promoted: beats the base" in said
    assert "1 -> 2: promoted" in said


def test_lineage_prints_the_chain_with_full_fingerprints(registry: MlflowClient) -> None:
    result = models("lineage", "orders@champion")
    assert result.exit_code == 0
    tags = registry.get_model_version("orders", "2").tags
    steps = ("evaluate.tuned", "merge", "convert", "train", "pack", "normalize", "fetch.0", "base_model_fingerprint")
    places = [result.output.index(tags[f"sft.{step}"]) for step in steps]
    assert places == sorted(places)
    assert "transformers 5." in result.output


def test_find_row_names_the_versions_to_retrain() -> None:
    said = models("find-row", "orders", json.dumps(row(20))).output
    assert "trained on it: 1, 2" in said or said.count("held out") == 2


def test_diff_counts_rows_and_names_keys() -> None:
    said = models("diff", "orders", "1", "2", "--rows", "0").output
    assert "orders 1 -> 2" in said
    assert "train.max_steps: 3 -> 8" in said
    assert "rows added: 0" not in said
    assert "rows removed: 0" not in said


def test_rollback_and_promote(registry: MlflowClient) -> None:
    assert "champion 2 -> 1; version 2 is barred" in models("rollback", "orders", "--reason", "bad").output
    assert aliases(registry)["champion"] == "1"
    refused = models("promote", "orders", "2", "--reason", "good", "--override-gate")
    assert isinstance(refused.exception, RegistryError)
    assert "barred: bad" in models("list", "orders").output
    assert models("rollback", "orders").exit_code == 2  # a reason is asked for


def test_reproduce_ends_with_status_1_where_a_step_differs(registry: MlflowClient, tmp_path: Path) -> None:
    run = registry.search_runs(
        [registry.get_experiment_by_name("orders").experiment_id],
        "tags.`sft.part` = 'prepare'",
        order_by=["start_time"],
    )[0]
    held = Path(run.info.artifact_uri.removeprefix("file://"))
    copy = shutil.copytree(held, tmp_path / "artifacts")
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        database.execute("UPDATE runs SET artifact_uri = ? WHERE run_uuid = ?", (copy.as_uri(), run.info.run_id))
    path = copy / "manifests" / "fetch-0.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["rows/part-00000.parquet"]["sha256"] = "0" * 64
    path.write_text(json.dumps(manifest))
    result = models("reproduce", "orders/1", "--into", str(tmp_path / "again"))
    assert "fetch/0: DIFFERS: rows/part-00000.parquet" in result.output
    assert isinstance(result.exception, RegistryError)
    assert "fetch/0 is the first step that differs" in str(result.exception)
