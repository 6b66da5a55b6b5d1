"""`sft run --rehearse`: as a process of its own, with the real flow; nothing of the user's is touched."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from cli.rehearse import rehearse as rehearse_recipe
from sft_core.errors import DataError
from sft_core.plan import plan_recipe
from sft_core.recipe import resolve
from sft_core.steps import Retraining, run_step
from sft_core.store import Store

ROOT = Path(__file__).parents[2]
REHEARSAL_SECONDS = 800
"""Bound on one rehearsal; on two idle cores it takes about a minute."""
pytestmark = [pytest.mark.slow, pytest.mark.timeout(REHEARSAL_SECONDS + 60)]
RECIPE = """
name: orders
store: ./store
base_model: {path: base}
datasets: [{path: rows.jsonl, map_fn: "reader.py:read"}]
pack: {max_length: 64, chat_template: chatml}
train: {dtype: float16, lora: {r: 4, lora_alpha: 8}, gradient_accumulation_steps: 8}
compute: {train: train/gpu}
evaluate: {max_new_tokens: 4}
"""
READER = """
def read(row):
    return {"conversation": [{"input": row["ask"], "output": row["say"]}]}
"""


@pytest.fixture
def project(tmp_path: Path, tiny_model: Path) -> Path:
    folder = tmp_path / "project"
    shutil.copytree(tiny_model, folder / "base")
    rows = [{"ask": f"say w{i}", "say": f"w{i * 7}"} for i in range(59)] + [{"ask": "it", "say": "long " * 99}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "reader.py").write_text(READER)
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "prefect.toml").write_text('[api]\nurl = "http://127.0.0.1:9/api"\n')
    (tmp_path / "scratch").mkdir()
    return folder


def rehearse(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """With servers of the user's own configured, which do not exist: reaching for them would fail."""
    own = {
        "TMPDIR": str(folder.parent / "scratch"),
        "PREFECT_HOME": str(folder / "prefect"),
        "PREFECT_API_URL": "http://127.0.0.1:9/api",
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
        "MLFLOW_REGISTRY_URI": "http://127.0.0.1:9",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "150",
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.run(
        [sys.executable, "-m", "cli.main", "run", "recipe.yaml", "--rehearse", *options],
        cwd=folder,
        env={**os.environ, **own},
        capture_output=True,
        text=True,
        timeout=REHEARSAL_SECONDS,
    )


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"__pycache__"}


def test_a_rehearsal_goes_through_all_steps_and_leaves_nothing(project: Path) -> None:
    before = names(project)
    done = rehearse(project)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert names(project) == before
    assert names(project.parent / "scratch") == set()
    lines = done.stdout.splitlines()
    steps = [line.split()[:2] for line in lines if line.split()[1:2] == ["ok"]]
    expected = "fetch/0 normalize pack train convert merge evaluate/tuned evaluate/base register".split()
    assert steps == [[step, "ok"] for step in expected]
    assert "3 optimizer steps" in done.stdout
    for words in ("the first 60 of 60 of rows.jsonl", "float16 -> bfloat16", "not on train/gpu (train)", "overlong"):
        assert words in done.stdout.replace("are over max_length", "overlong"), words
    words = " ".join(done.stdout.split())
    assert "the run fails: of the data" in words
    assert "trained tokens (" in words
    assert "max_quarantined_fraction allows 5.0%" in words
    assert "optimizer steps on 1 rank" in done.stdout
    assert "memory: about" in done.stdout
    assert "normalize: fails in the real run: about 1 held-out rows are too few" in done.stdout  # 60 rows, 0.02
    assert "train: about 11 optimizer steps in all" in done.stdout  # 29 packed rows, 3 epochs, 8 rows a step


def test_a_fault_of_the_recipe_ends_it_with_the_steps_own_error(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The steps without the flow around them: that a flow ends with its step's own error is test_retrain's."""
    (project / "reader.py").write_text(READER.replace('row["say"]', 'row["answer"]'))
    monkeypatch.chdir(project)
    monkeypatch.setattr(tempfile, "tempdir", str(project.parent / "scratch"))
    with pytest.raises(DataError) as failed:
        rehearse_recipe(resolve("recipe.yaml"), [], False, all_steps)
    assert "no training rows are left of 60" in str(failed.value)
    assert "0-rows.jsonl row 1" in str(failed.value)
    said = capsys.readouterr()
    lines = {line.split()[0]: line for line in said.out.splitlines() if line.strip()}
    assert "ok" in lines["fetch/0"]
    assert "failed" in lines["normalize"]
    assert "not reached" in lines["train"]
    (kept,) = (project.parent / "scratch").glob("sft-rehearsal-*")
    assert f"kept: {kept}" in said.err
    assert not (project / "store").exists()


def all_steps(file: str) -> None:
    """The recipe's steps, one after another."""
    recipe = resolve(file)
    run = Retraining(recipe, plan_recipe(recipe), Store(recipe.store), lambda _: None)
    for key in run.plan.steps:
        run_step(run, key)
