"""Full fine-tuning through the front door: every trained weight ends up in a registered version, rounded once."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from mlflow.tracking import MlflowClient
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
RUN_SECONDS = 800
"""Bound on one command; on two idle cores `sft run` takes about 60 s."""
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


def sft(folder: Path, *arguments: str, ok: bool = True) -> str:
    environment = {
        **os.environ,
        "PREFECT_HOME": str(folder / "prefect"),
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "150",
        "HF_HUB_OFFLINE": "1",
    }
    environment.pop("PREFECT_API_URL", None)
    done = subprocess.run(
        [sys.executable, "-m", "cli.main", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=RUN_SECONDS,
        check=False,
    )
    assert (done.returncode == 0) == ok, done.stdout[-3000:] + done.stderr[-3000:]
    assert "Traceback" not in done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def checkpoint(project: Path) -> Path:
    """What `sft train` leaves."""
    return Path(sft(project, "train", "recipe.yaml").rpartition("checkpoint: ")[2].strip())


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
    project: Path, checkpoint: Path, masters: dict[str, torch.Tensor]
) -> None:
    said = sft(project, "convert", "pth-to-hf", "recipe.yaml", str(checkpoint), "masters")
    assert "masters: 21 tensors" in said
    assert_equal(load_file(project / "masters" / "model.safetensors"), masters, torch.float32)
    sft(project, "convert", "pth-to-hf", "recipe.yaml", str(checkpoint), "small", "--dtype", "bfloat16")
    assert_equal(load_file(project / "small" / "model.safetensors"), masters, torch.bfloat16)
    assert json.loads((project / "small" / "config.json").read_text())["dtype"] == "bfloat16"
    refused = sft(project, "convert", "pth-to-hf", "recipe.yaml", str(checkpoint), "x", "--lora-alpha", "4", ok=False)
    assert "--lora-alpha: the recipe's train.lora is null" in refused


def test_one_command_registers_the_trained_weights_rounded_once(
    project: Path, masters: dict[str, torch.Tensor]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    said = sft(project, "run", "recipe.yaml")
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


def test_a_second_run_reuses_everything(project: Path) -> None:
    assert "every step reused, nothing new to register: whole version 1" in sft(project, "run", "recipe.yaml")
    assert sft(project, "explain", "recipe.yaml").count("reused") == 7
