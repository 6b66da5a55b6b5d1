"""A project with two registered versions, made by two real `sft run`s, the first as a process of its own: built once a
session, and copied by whoever changes it."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
from filelock import FileLock
from mlflow.tracking import MlflowClient
from prefect.logging import disable_run_logger

from sft_core.plan import Plan
from sft_core.recipe import Recipe, resolve
from tasks import register, tracking
from tasks.lineage import read_recorded
from tasks.registry import find_champion, read_version
from tasks.run_step import Job
from tests.commands import Commands

ROOT = Path(__file__).parents[2]
RUN_SECONDS = 800
RECIPE = """
name: orders
store: {folder}/store
base_model: {{path: {folder}/base}}
datasets: [{{path: "{folder}/rows.jsonl", map_fn: "{folder}/reader.py:read"}}]
eval_fraction: 0.2
pack: {{max_length: 64, chat_template: chatml}}
train:
  dtype: float32
  lora: {{r: 4, lora_alpha: 8, lora_dropout: 0.0}}
  max_steps: 3
  per_device_train_batch_size: 2
  gradient_accumulation_steps: 1
  learning_rate: 1.0e-2
  gradient_checkpointing: false
  logging_steps: 1
evaluate: {{max_new_tokens: 4, max_generated_rows: 2}}
"""
READER = """
def read(row):
    return {"conversation": [{"input": row["ask"], "output": finish(row["say"])}]}


def finish(text):
    return text + ""
"""
BROKEN = {"ask": "say it", "say": None}
"""A row that no version can use."""
VERSIONS = ((range(60), 3), (range(5, 70), 8))
"""Numbers of the rows, optimizer steps."""


def row(number: int) -> dict[str, str]:
    return {"ask": f"say w{number}", "say": f"w{number}"}


def write_rows(folder: Path, numbers: range, *more: dict[str, str | None]) -> None:
    rows = [*map(row, numbers), *more]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def environment(folder: Path, database: Path) -> dict[str, str]:
    settings = {
        "PREFECT_HOME": str(folder / "prefect"),
        "MLFLOW_TRACKING_URI": f"sqlite:///{database}",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    return {**{name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}, **settings}


def build(folder: Path, tiny_model: Path, commands: Commands) -> None:
    """Version 1, with what `sft run` printed; then version 2 with other rows and more steps; both promoted."""
    shutil.copytree(tiny_model, folder / "base")
    (folder / "reader.py").write_text(READER)
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder))
    (numbers, _), (later, steps) = VERSIONS
    write_rows(folder, numbers, BROKEN)
    first = subprocess.run(
        [sys.executable, "-m", "cli.main", "run", "recipe.yaml"],
        cwd=folder,
        env={**environment(folder, folder / "mlflow.db"), "COLUMNS": "150", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=RUN_SECONDS,
    )
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
    (folder / "first.out").write_text(first.stdout)
    (folder / "first.err").write_text(first.stderr)
    write_rows(folder, later, BROKEN)
    uri, again = f"sqlite:///{folder}/mlflow.db", ("run", "recipe.yaml", "--set", f"train.max_steps={steps}")
    second = commands.run(folder, *again, MLFLOW_TRACKING_URI=uri)
    assert second.returncode == 0, second.stdout[-3000:] + second.stderr[-3000:]


@pytest.fixture(scope="session")
def built_project(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, commands: Commands) -> Path:
    """The project's folder; do not write to its database. Workers of one session share it."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = shared / "models-project"
    with FileLock(f"{folder}.lock"):
        if not (folder / "built").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            build(folder, tiny_model, commands)
            (folder / "built").touch()
    return folder


@pytest.fixture
def registry(built_project: Path, tmp_path: Path) -> Iterator[MlflowClient]:
    """The registry as the two runs left it, in a database of the test's own."""
    yield from connected(shutil.copyfile(built_project / "mlflow.db", tmp_path / "mlflow.db"))


@pytest.fixture
def empty_registry(empty_database: Path, tmp_path: Path) -> Iterator[MlflowClient]:
    yield from connected(shutil.copyfile(empty_database, tmp_path / "mlflow.db"))


def connected(where: Path | str) -> Iterator[MlflowClient]:
    """`where`: a database's file, or a server's URL."""
    mlflow.set_tracking_uri(f"sqlite:///{where}" if isinstance(where, Path) else where)
    tracking.client.cache_clear()
    yield tracking.client()
    mlflow.set_tracking_uri(None)
    tracking.client.cache_clear()


def recorded_job(built: Path, number: str, **changes: Any) -> tuple[Recipe, Plan]:
    """Recipe and plan of a version of the built project; `changes`: of the recipe's section `register`."""
    before = mlflow.get_tracking_uri()
    for _ in connected(built / "mlflow.db"):
        recorded = read_recorded("orders", read_version("orders", number))
    mlflow.set_tracking_uri(before)
    tracking.client.cache_clear()
    return resolve(recorded.recipe, {"register": changes}), Plan.from_dict(recorded.plan)


def register_again(built: Path, number: str, **changes: Any) -> dict[str, Any]:
    """Register a version of the built project in the registry at hand; Prefect's part (logger, artifact, event) is left
    out. What `register` returns."""
    recipe, plan = recorded_job(built, number, **changes)
    with pytest.MonkeyPatch.context() as patch, disable_run_logger():
        for name in ("show_report", "announce"):
            patch.setattr(register, name, lambda *_: None)
        with tracking.part_run("publish", recipe, plan) as part:
            registered: dict[str, Any] = register.register.fn(
                Job(recipe=recipe, plan=plan, part=part), find_champion("orders")
            )
    return registered


def aliases(client: MlflowClient) -> dict[str, str]:
    return {alias: str(number) for alias, number in client.get_registered_model("orders").aliases.items()}
