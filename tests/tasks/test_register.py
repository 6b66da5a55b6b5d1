"""Registering: one version a model however many processes try, and a verdict that rests on the present champion."""

import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
from mlflow.tracking import MlflowClient

from sft_core.pack import IGNORE_INDEX, encode_messages, load_chat_template
from tasks.registry import read_versions
from tests.tasks.models_project import (
    ROOT,
    aliases,
    built_project,
    empty_registry,
    environment,
    register_again,
    registry,
)

__all__ = ["built_project", "empty_registry", "registry"]
pytestmark = pytest.mark.slow
RACE_SECONDS = 800


def race(built: Path, folder: Path, numbers: list[str]) -> None:
    """Register versions of the built project in `folder`'s registry, all at once, a process each."""
    gate = folder / "gate"
    settings = {**environment(built, folder / "mlflow.db"), "SFT_BUILT": f"sqlite:///{built}/mlflow.db"}
    command = [sys.executable, "-m", "tests.tasks.register_once", str(gate), *numbers]
    racers = subprocess.Popen(command, cwd=ROOT, env=settings, stdout=subprocess.PIPE, text=True)
    assert racers.stdout is not None
    for _ in numbers:
        assert "ready\n" in iter(racers.stdout.readline, ""), "one ended before it was ready"
    gate.touch()
    racers.communicate(timeout=RACE_SECONDS)
    assert racers.returncode == 0


def test_of_processes_that_register_at_once_each_model_has_one_version_and_the_later_is_judged_against_the_earlier(
    built_project: Path, empty_registry: MlflowClient, tmp_path: Path
) -> None:
    """Two try to register version 1's model, one version 2's."""
    empty_registry.search_experiments()  # the tables are there before the race
    race(built_project, tmp_path, ["1", "1", "2"])
    first, second = read_versions("orders")
    merged = {number: version_of(built_project, number)["sft.merged_fingerprint"] for number in ("1", "2")}
    assert {first.merged_fingerprint, second.merged_fingerprint} == set(merged.values())
    assert first.tags["sft.judged_against"] == "none"
    assert second.tags["sft.judged_against"] == "1"
    assert "champion" in second.verdict
    assert first.settled
    assert second.settled
    assert aliases(empty_registry)["candidate"] == "2"
    assert [model.name for model in empty_registry.search_registered_models()] == ["orders"]


def test_a_model_that_does_not_beat_the_champion_is_a_candidate_alone(
    built_project: Path, empty_registry: MlflowClient
) -> None:
    """Version 2's model was trained longer than version 1's."""
    assert register_again(built_project, "2")["aliases"] == ["candidate", "champion"]
    assert "does not beat the champion" in register_again(built_project, "1")["verdict"]
    assert aliases(empty_registry) == {"candidate": "2", "champion": "1"}


def test_the_gate_never_promotes_a_model_that_was_rolled_back(
    built_project: Path, empty_registry: MlflowClient
) -> None:
    merged = version_of(built_project, "1")["sft.merged_fingerprint"]
    empty_registry.create_registered_model("orders", {f"sft.barred.{merged}": "answers in French"})
    register_again(built_project, "1")
    (version,) = read_versions("orders")
    assert version.verdict.startswith("not promoted: beats the base")
    assert "this model is barred: answers in French" in version.verdict
    assert aliases(empty_registry) == {"candidate": "1"}


def version_of(built: Path, number: str) -> dict[str, str]:
    client = MlflowClient(f"sqlite:///{built}/mlflow.db")
    return dict(client.get_model_version("orders", number).tags)


def test_the_adapter_of_a_version_loads_with_peft(registry: MlflowClient) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    version = registry.get_model_version_by_alias("orders", "champion")
    adapter = mlflow.artifacts.download_artifacts(f"runs:/{version.run_id}/adapter")
    base = AutoModelForCausalLM.from_pretrained(version.tags["sft.base_model"])
    norms = [
        w.norm().item() for name, w in PeftModel.from_pretrained(base, adapter).named_parameters() if "lora_B" in name
    ]
    assert norms
    assert min(norms) > 0
    asked = [{"role": "user", "content": "say w1"}]
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)["input_ids"]
    trained = encode_messages(
        [*asked, {"role": "assistant", "content": "w1", "weight": 1}],
        AutoTokenizer.from_pretrained(version.tags["sft.base_model"]),
        load_chat_template("chatml"),
    )
    start = next(i for i, label in enumerate(trained.labels) if label != IGNORE_INDEX)
    assert prompt == list(trained.input_ids[:start])


def test_a_version_names_all_that_it_rests_on(registry: MlflowClient, built_project: Path) -> None:
    entry = registry.get_model_version("orders", "2")
    assert entry.tags["sft.base_model"] == str(built_project / "base")
    assert {key for key, value in entry.tags.items() if len(value) == 64} >= {
        *(f"sft.{step}" for step in ("fetch.0", "normalize", "pack", "train", "convert", "merge", "evaluate.tuned")),
        *("sft.merged_fingerprint", "sft.base_model_fingerprint", "sft.retraining"),
    }
    assert len(entry.tags["sft.prefect_flow_run_id"]) == 36
    assert entry.tags["sft.promote"] == "true"
    assert float(entry.tags["sft.tuned.loss"]) < float(entry.tags["sft.base.loss"])
    for heading in ("# orders", "## Data", "## Training", "## Scores", "## Ancestry"):
        assert heading in entry.description
    run = registry.get_run(entry.run_id)
    inputs = {(i.dataset.name.rsplit("/", 1)[-1], i.dataset.digest) for i in run.inputs.dataset_inputs}
    raw, conversations = entry.tags["sft.fetch.0"][:32], entry.tags["sft.normalize"][:32]
    assert inputs == {
        ("rows.jsonl", raw),
        ("conversations-train", conversations),
        ("conversations-heldout", conversations),
    }
    assert len(run.outputs.model_outputs) == 1
    (adapter,) = (f for f in registry.list_artifacts(entry.run_id, "adapter") if f.path.endswith("_model.safetensors"))
    assert adapter.file_size > 0
