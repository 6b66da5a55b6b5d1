"""The whole DAG through the front door: `sft run` as a process of its own, real Prefect, real MLflow, real training."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow.tracking import MlflowClient

from tests.printed import unknown_lines

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
RUN_SECONDS = 800
"""Bound on one `sft run`; on two idle cores it takes about 60 s, most of it imports and the temporary server."""
RECIPE = """
name: orders
store: ./store
base_model: {path: base}
datasets: [{path: rows.jsonl, map_fn: "reader.py:read"}]
eval_fraction: 0.2
max_quarantined_fraction: 0.1
pack: {max_length: 64, chat_template: chatml}
train:
  dtype: float32
  lora: {r: 4, lora_alpha: 8, lora_dropout: 0.0}
  max_steps: 3
  per_device_train_batch_size: 2
  gradient_accumulation_steps: 1
  learning_rate: 1.0e-2
  gradient_checkpointing: false
  logging_steps: 1
evaluate: {max_new_tokens: 4, max_generated_rows: 2}
"""
READER = """
def read(row):
    return {"conversation": [{"input": row["ask"], "output": finish(row["say"])}]}


def finish(text):
    return text + "!"
"""


class Project:
    """A user's folder, and the command run in it."""

    def __init__(self, folder: Path, tiny_model: Path) -> None:
        self.folder = folder
        shutil.copytree(tiny_model, folder / "base")
        rows = [{"ask": f"say w{i}", "say": f"w{i}"} for i in range(59)] + [{"ask": "say it", "say": None}]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "reader.py").write_text(READER)
        (folder / "recipe.yaml").write_text(RECIPE)
        self.tracking_uri = f"sqlite:///{folder}/mlflow.db"
        self.stderr = self.stderr_of_first = ""

    def sft(self, *arguments: str, ok: bool = True) -> str:
        environment = {
            **os.environ,
            "PREFECT_HOME": str(self.folder / "prefect"),
            "MLFLOW_TRACKING_URI": self.tracking_uri,
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "150",
            "HF_HUB_OFFLINE": "1",
        }
        environment.pop("PREFECT_API_URL", None)
        done = subprocess.run(
            [sys.executable, "-m", "cli.main", *arguments],
            cwd=self.folder,
            env={**environment, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=RUN_SECONDS,
        )
        assert (done.returncode == 0) == ok, done.stdout[-3000:] + done.stderr[-3000:]
        self.stderr = done.stderr
        return done.stdout + done.stderr

    def client(self) -> MlflowClient:
        mlflow.set_tracking_uri(self.tracking_uri)
        return MlflowClient()


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Project:
    return Project(tmp_path_factory.mktemp("project"), tiny_model)


@pytest.fixture(scope="module")
def first(project: Project) -> str:
    printed = project.sft("run", "recipe.yaml")
    project.stderr_of_first = project.stderr
    return printed


def test_every_line_beside_the_summary_is_of_a_known_form(first: str, project: Project) -> None:
    assert "Finished in state Completed()" in project.stderr_of_first
    assert unknown_lines(project.stderr_of_first) == []


def test_one_command_takes_raw_rows_to_the_champion(first: str, project: Project) -> None:
    assert "orders version 1 (@candidate, @champion)" in first
    assert "1 set aside (map_fn_error 1)" in first
    assert "Traceback" not in first
    client = project.client()
    assert aliases(client) == {"candidate": "1", "champion": "1"}
    tags = client.get_model_version("orders", "1").tags
    assert tags["sft.verdict"].startswith("promoted: beats the base: loss")
    assert "answers that ended by themselves: tuned 0 of 2, base 0 of 2 (not judged: every" in tags["sft.verdict"]
    assert re.search(r"answers that ended +0 of 2 +0 of 2", first)
    assert len(tags["sft.merged_fingerprint"]) == 64
    logged = client.get_logged_model(client.get_model_version("orders", "1").source.removeprefix("models:/"))
    assert json.loads(logged.tags["mlflow.modelVersions"]) == [{"name": "orders", "version": "1"}]


def test_every_part_is_a_finished_run_that_holds_its_manifests(first: str, project: Project) -> None:
    client = project.client()
    experiment = client.get_experiment_by_name("orders")
    runs = client.search_runs([experiment.experiment_id])
    by_part = {run.data.tags["sft.part"]: run for run in runs}
    assert len(runs) == len(by_part) == 4
    assert {run.info.status for run in runs} == {"FINISHED"}
    held = {
        part: {file.path.removeprefix("manifests/") for file in client.list_artifacts(run.info.run_id, "manifests")}
        for part, run in by_part.items()
    }
    assert held["prepare"] == {"fetch-0.json", "normalize.json", "pack.json"}
    assert held["train"] == {"train.json"}
    assert held["publish"] == {"convert.json", "merge.json", "evaluate-tuned.json", "evaluate-base.json"}
    parent = by_part["retraining"].info.run_id
    assert {by_part[p].data.tags["mlflow.parentRunId"] for p in held if p != "retraining"} == {parent}
    figures = by_part["publish"].data.metrics
    assert {figures[f"evaluate/{name}/ended"] for name in ("tuned", "base")} == {0.0}  # four tokens are too few
    losses = client.get_metric_history(by_part["train"].info.run_id, "train/loss")
    assert [metric.step for metric in losses] == [1, 2, 3]
    assert by_part["retraining"].data.params["train.learning_rate"] == "0.01"


def test_consumers_load_the_champion(first: str, project: Project) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    project.client()
    folder = Path(mlflow.artifacts.download_artifacts("models:/orders@champion")) / "model"
    assert AutoModelForCausalLM.from_pretrained(folder).config.hidden_size == 64
    assert "<|im_start|>" in AutoTokenizer.from_pretrained(folder).chat_template


def test_the_second_run_reuses_everything_and_registers_nothing(first: str, project: Project) -> None:
    again = project.sft("run", "recipe.yaml")
    assert "every step reused, nothing new to register: orders version 1" in again
    assert "Starting temporary server" not in again
    assert len(project.client().search_model_versions("name='orders'")) == 1


def test_explain_follows_a_changed_helper_and_a_changed_key(first: str, project: Project) -> None:
    assert project.sft("explain", "recipe.yaml").count("reused") == 8
    changed = project.sft("explain", "recipe.yaml", "--set", "train.learning_rate=1e-3")
    assert changed.count("reused") == 4
    assert "train.learning_rate: 0.01 -> 0.001" in changed
    reader = project.folder / "reader.py"
    reader.write_text(READER.replace('"!"', '"?"'))
    assert project.sft("explain", "recipe.yaml").count("reused") == 1
    reader.write_text(READER)


def test_a_new_learning_rate_makes_a_second_version_judged_against_the_first(first: str, project: Project) -> None:
    text = project.sft("run", "recipe.yaml", "--set", "train.learning_rate=1e-9", "--set", "train.max_steps=2")
    assert "Finished in state Reused" in text
    client = project.client()
    assert aliases(client) == {"candidate": "2", "champion": "1"}
    assert "does not beat the champion" in client.get_model_version("orders", "2").tags["sft.verdict"]


def test_too_many_bad_rows_fail_the_run_with_one_clear_error(first: str, project: Project) -> None:
    text = project.sft("run", "recipe.yaml", "--set", "max_quarantined_fraction=0.001", ok=False)
    assert "Traceback" not in text
    last = text[text.rindex("error: ") :]
    assert "rows.jsonl" in last
    assert "max_quarantined_fraction" in last
    client = project.client()
    runs = client.search_runs([client.get_experiment_by_name("orders").experiment_id], "attributes.status = 'RUNNING'")
    assert list(runs) == []


def test_too_few_held_out_rows_end_the_run_before_it_trains(first: str, project: Project) -> None:
    trained = len(list((project.folder / "store/train").iterdir()))
    text = project.sft("run", "recipe.yaml", "--set", "eval_fraction=0.05", ok=False)
    assert "Traceback" not in text
    last = text[text.rindex("error: ") :]
    assert "held-out rows are too few" in last
    assert "eval_fraction" in last
    assert "register.min_heldout_rows: 1 trains all the same" in last
    assert "Task run 'pack" not in text
    assert len(list((project.folder / "store/train").iterdir())) == trained


def test_chat_answers_from_the_registry_and_from_folders(first: str, project: Project) -> None:
    def chat(*arguments: Any) -> str:
        return subprocess.run(
            [sys.executable, "-m", "cli.main", "chat", *map(str, arguments), "--max-new-tokens", "3"],
            cwd=project.folder,
            env={**os.environ, "MLFLOW_TRACKING_URI": project.tracking_uri, "PYTHONPATH": str(ROOT)},
            input="say w1\n/reset\nsay w2\n/exit\n",
            capture_output=True,
            text=True,
            timeout=RUN_SECONDS,
            check=True,
        ).stdout

    from_registry = chat("models:/orders@champion")
    (merged,) = (p.parent for p in (project.folder / "store/merge").glob("*/config.json") if first_version(project, p))
    assert chat(merged) == from_registry
    assert from_registry.count("\n") >= 2


def aliases(client: MlflowClient) -> dict[str, str]:
    return {alias: str(number) for alias, number in client.get_registered_model("orders").aliases.items()}


def first_version(project: Project, config: Path) -> bool:
    return config.parent.name == project.client().get_model_version("orders", "1").tags["sft.merged_fingerprint"]
