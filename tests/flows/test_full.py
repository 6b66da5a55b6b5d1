"""Full fine-tuning through the front door: every trained weight ends up in a registered version, rounded once."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from mlflow.tracking import MlflowClient
from safetensors.torch import load_file

from tests.commands import Commands

pytestmark = pytest.mark.slow
Sft = Callable[..., str]
RECIPE = """
name: whole
store: ./store
base_model: {path: base}
datasets: [{path: rows.jsonl, map_fn: alpaca}]
eval_fraction: 0.2
pack: {max_length: 64, chat_template: chatml}
train:
  quantization: none
  lora: null
  deepspeed: zero2
  dtype: bfloat16
  max_steps: 3
  per_device_train_batch_size: 2
  gradient_accumulation_steps: 1
  learning_rate: 1.0e-2
  gradient_checkpointing: false
evaluate: {max_new_tokens: 4, max_generated_rows: 2}
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("full")
    shutil.copytree(tiny_model, folder / "base")
    rows = [{"instruction": f"say w{i}", "input": "", "output": f"w{i}!"} for i in range(60)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.yaml").write_text(RECIPE)
    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    return folder


@pytest.fixture(scope="module")
def sft(project: Path, commands: Commands) -> Sft:
    """A command in the project: what it says."""

    def run(*arguments: str, ok: bool = True) -> str:
        done = commands.run(project, *arguments, MLFLOW_TRACKING_URI=f"sqlite:///{project}/mlflow.db")
        assert (done.returncode == 0) == ok, done.stdout[-3000:] + done.stderr[-3000:]
        assert "Traceback" not in done.stdout + done.stderr
        return done.stdout + done.stderr

    return run


@pytest.fixture(scope="module")
def checkpoint(sft: Sft) -> Path:
    """What `sft train` leaves."""
    return Path(sft("train", "recipe.yaml").rpartition("checkpoint: ")[2].strip())


@pytest.fixture(scope="module")
def masters(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The trained weights as DeepSpeed's own program reads them."""
    found = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint))
    assert len(found) == 21
    return {name: tensor.contiguous() for name, tensor in found.items()}


def assert_equal(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == dtype
        assert torch.equal(got[name], tensor.to(dtype)), name


def test_the_command_converts_to_the_masters_bit_for_bit(
    sft: Sft, project: Path, checkpoint: Path, masters: dict[str, torch.Tensor]
) -> None:
    said = sft("convert", "pth-to-hf", "recipe.yaml", str(checkpoint), "masters")
    assert "masters: 21 tensors" in said
    assert_equal(load_file(project / "masters" / "model.safetensors"), masters, torch.float32)
    sft("convert", "pth-to-hf", "recipe.yaml", str(checkpoint), "small", "--dtype", "bfloat16")
    assert_equal(load_file(project / "small" / "model.safetensors"), masters, torch.bfloat16)
    assert json.loads((project / "small" / "config.json").read_text())["dtype"] == "bfloat16"
    refused = sft("convert", "pth-to-hf", "recipe.yaml", str(checkpoint), "x", "--lora-alpha", "4", ok=False)
    assert "--lora-alpha: the recipe's train.lora is null" in refused


def test_one_command_registers_the_trained_weights_rounded_once(
    sft: Sft, project: Path, masters: dict[str, torch.Tensor]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    said = sft("run", "recipe.yaml")
    assert "whole version 1 (@candidate, @champion)" in said
    base = load_file(project / "base" / "model.safetensors")
    assert not any(torch.equal(base[name], tensor) for name, tensor in masters.items() if "proj" in name)
    folder = Path(mlflow.artifacts.download_artifacts("models:/whole@champion")) / "model"
    assert_equal(load_file(folder / "model.safetensors"), masters, torch.bfloat16)
    assert "<|im_start|>" in AutoTokenizer.from_pretrained(folder).chat_template
    assert AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id == 2
    (stored,) = (project / "store" / "merge").glob("*/README.md")
    assert "Not certified: all weights were trained" in stored.read_text()


def test_lineage_leads_from_the_version_to_the_checkpoint(project: Path, checkpoint: Path) -> None:
    tags = MlflowClient().get_model_version("whole", "1").tags
    assert "sft.convert" not in tags
    merged = json.loads((project / "store" / "merge" / tags["sft.merged_fingerprint"] / "manifest.json").read_text())
    assert (merged["kind"], merged["inputs"]["checkpoint"]) == ("MergedModel", tags["sft.train"])
    assert checkpoint.parent.name == tags["sft.train"]
    assert merged["facts"]["certificate"]["certified"] is False


def test_a_second_run_reuses_everything(sft: Sft) -> None:
    assert "every step reused, nothing new to register: whole version 1" in sft("run", "recipe.yaml")
    assert sft("explain", "recipe.yaml").count("reused") == 7
