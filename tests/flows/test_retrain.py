"""The whole DAG through the front door: `sft run` as a process of its own, real Prefect, real MLflow, real training;
then further commands on what it left."""

import json
import re
import shutil
from pathlib import Path

import mlflow
import pytest
from mlflow.tracking import MlflowClient

from tests.commands import Commands
from tests.printed import unknown_lines
from tests.tasks.models_project import BROKEN, READER, RECIPE, VERSIONS, built_project, write_rows

__all__ = ["built_project"]
pytestmark = pytest.mark.slow


class Project:
    """A copy of the built project as its first run found it, with what both runs left; and commands run in it."""

    def __init__(self, folder: Path, built: Path, commands: Commands) -> None:
        self.folder, self._commands = folder, commands
        for name in ("base", "store"):
            shutil.copytree(built / name, folder / name)
        shutil.copyfile(built / "mlflow.db", folder / "mlflow.db")
        (folder / "reader.py").write_text(READER)
        (folder / "recipe.yaml").write_text(RECIPE.format(folder="."))
        write_rows(folder, VERSIONS[0][0], BROKEN)
        self.tracking_uri = f"sqlite:///{folder}/mlflow.db"

    def sft(self, *arguments: str, ok: bool = True, given: str = "") -> str:
        done = self._commands.run(self.folder, *arguments, given=given, MLFLOW_TRACKING_URI=self.tracking_uri)
        assert (done.returncode == 0) == ok, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout + done.stderr

    def client(self) -> MlflowClient:
        mlflow.set_tracking_uri(self.tracking_uri)
        return MlflowClient()


@pytest.fixture(scope="module")
def project(built_project: Path, tmp_path_factory: pytest.TempPathFactory, commands: Commands) -> Project:
    return Project(tmp_path_factory.mktemp("project"), built_project, commands)


@pytest.fixture
def first(built_project: Path) -> str:
    """What the first run printed."""
    return (built_project / "first.out").read_text() + (built_project / "first.err").read_text()


def test_every_line_beside_the_summary_is_of_a_known_form(built_project: Path) -> None:
    printed = (built_project / "first.err").read_text()
    assert "Finished in state Completed()" in printed
    assert unknown_lines(printed) == []


def test_one_command_takes_raw_rows_to_the_champion(first: str, project: Project) -> None:
    assert "orders version 1 (@candidate, @champion)" in first
    assert "1 set aside (map_fn_error 1)" in first
    assert "Traceback" not in first
    client = project.client()
    tags = client.get_model_version("orders", "1").tags
    assert tags["sft.verdict"].startswith("promoted: beats the base: loss")
    assert "answers that ended by themselves: tuned 0 of 2, base 0 of 2 (not judged: every" in tags["sft.verdict"]
    assert re.search(r"answers that ended +0 of 2 +0 of 2", first)
    assert len(tags["sft.merged_fingerprint"]) == 64
    logged = client.get_logged_model(client.get_model_version("orders", "1").source.removeprefix("models:/"))
    assert json.loads(logged.tags["mlflow.modelVersions"]) == [{"name": "orders", "version": "1"}]


def test_every_part_is_a_finished_run_that_holds_its_manifests(project: Project) -> None:
    client = project.client()
    experiment = client.get_experiment_by_name("orders")
    runs = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time"])[:4]  # then the second's
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


def test_consumers_load_the_champion(project: Project) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    project.client()
    folder = Path(mlflow.artifacts.download_artifacts("models:/orders@champion")) / "model"
    assert AutoModelForCausalLM.from_pretrained(folder).config.hidden_size == 64
    assert "<|im_start|>" in AutoTokenizer.from_pretrained(folder).chat_template


def test_the_second_run_reuses_everything_and_registers_nothing(project: Project) -> None:
    again = project.sft("run", "recipe.yaml")
    assert "every step reused, nothing new to register: orders version 1" in again
    assert "starting Prefect" not in again
    assert len(project.client().search_model_versions("name='orders'")) == 2


def test_explain_follows_a_changed_helper_and_a_changed_key(project: Project) -> None:
    assert project.sft("explain", "recipe.yaml").count("reused") == 8
    changed = project.sft("explain", "recipe.yaml", "--set", "train.learning_rate=1e-3")
    assert changed.count("reused") == 4
    assert "train.learning_rate: 0.01 -> 0.001" in changed
    reader = project.folder / "reader.py"
    reader.write_text(READER.replace('""', '"?"'))
    assert project.sft("explain", "recipe.yaml").count("reused") == 1
    reader.write_text(READER)


def test_too_many_bad_rows_fail_the_run_with_one_clear_error(project: Project) -> None:
    text = project.sft("run", "recipe.yaml", "--set", "max_quarantined_fraction=0.001", ok=False)
    assert "Traceback" not in text
    assert "Finished in state Reused" in text  # fetch
    last = text[text.rindex("error: ") :]
    assert "rows.jsonl" in last
    assert "max_quarantined_fraction" in last
    client = project.client()
    runs = client.search_runs([client.get_experiment_by_name("orders").experiment_id], "attributes.status = 'RUNNING'")
    assert list(runs) == []


def test_too_few_held_out_rows_end_the_run_before_it_trains(project: Project) -> None:
    trained = len(list((project.folder / "store/train").iterdir()))
    text = project.sft("run", "recipe.yaml", "--set", "eval_fraction=0.05", ok=False)
    assert "Traceback" not in text
    last = text[text.rindex("error: ") :]
    assert "held-out rows are too few" in last
    assert "eval_fraction" in last
    assert "register.min_heldout_rows: 1 trains all the same" in last
    assert "Task run 'pack" not in text
    assert len(list((project.folder / "store/train").iterdir())) == trained


def test_chat_answers_from_the_registry_and_from_folders(project: Project) -> None:
    def chat(model: str) -> str:
        return project.sft("chat", model, "--max-new-tokens", "3", given="say w1\n/reset\nsay w2\n/exit\n")

    from_registry = chat("models:/orders/1")
    merged = project.client().get_model_version("orders", "1").tags["sft.merged_fingerprint"]
    assert chat(str(project.folder / "store" / "merge" / merged)) == from_registry
    assert from_registry.count("\n") >= 2
