"""`sft train` for real on several machines: the same weights, whatever starts the ranks."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.sft_core.netns_pair import two_machines
from tests.sft_core.slurm_daemons import missing, slurm
from tests.sft_core.train_runs import losses, weights_hash

ROOT = Path(__file__).parents[2]
RUN_TIMEOUT = 800
"""Seconds; a run takes 15 on two idle cores."""
RECIPE = """
name: launched
store: ./store
base_model: {{path: {model}}}
datasets: [{{path: rows.jsonl, map_fn: alpaca}}]
eval_fraction: 0.1
pack: {{max_length: 128, chat_template: chatml}}
train: {{quantization: none, dtype: float32, lora: {{r: 4, lora_dropout: 0.0}}, gradient_checkpointing: false,
        gradient_accumulation_steps: 2, learning_rate: 0.01, max_steps: 6, num_train_epochs: 6, logging_steps: 1}}
"""
NODES = {"NNODES": "2", "NPROC_PER_NODE": "1", "PORT": "29611"}


def make_folder(folder: Path, model: Path) -> Path:
    rows = [{"instruction": f"say w{i * 7919 % 1007}", "input": "", "output": f"w{i}!"} for i in range(60)]
    folder.mkdir(parents=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.yaml").write_text(RECIPE.format(model=model))
    return folder


def start(
    folder: Path, *options: str, before: tuple[str, ...] = (), environment: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    command = [*before, sys.executable, "-m", "cli.main", "train", "recipe.yaml", "--deepspeed", "deepspeed_zero2"]
    return subprocess.Popen(
        [*command, *options],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], status: int = 0) -> tuple[str, str]:
    out, err = process.communicate(timeout=RUN_TIMEOUT)
    assert process.returncode == status, out + err
    return out, err


def artifact(folder: Path) -> Path:
    [manifest] = folder.glob("store/train/*/manifest.json")
    return manifest.parent


@pytest.fixture(scope="module")
def one_machine(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """Two ranks by torchrun, stopped by SIGTERM in between."""
    folder = make_folder(tmp_path_factory.mktemp("one") / "run", tiny_model)
    two = {"NPROC_PER_NODE": "2"}
    process = start(folder, environment=two)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 2/"):
            process.send_signal(signal.SIGTERM)
    _, err = finish(process, 75)
    assert re.fullmatch(r"stopped: training was stopped by SIGTERM; its finished optimizer steps are saved, .*\n", err)
    out, _ = finish(start(folder, environment=two))
    assert re.search(r"resuming from checkpoint-[2-5] of 6", out)
    return artifact(folder)


@pytest.mark.slow
@pytest.mark.timeout(2 * RUN_TIMEOUT)
def test_two_machines_train_the_weights_of_one(one_machine: Path, tiny_model: Path, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "run", tiny_model)
    try:
        with two_machines() as (first, second):
            environment = {**NODES, "ADDR": first.addr}
            along = start(folder, before=second.enter, environment={**environment, "NODE_RANK": "1"})
            leader = start(folder, before=first.enter, environment={**environment, "NODE_RANK": "0"})
            out, _ = finish(leader)
            other, _ = finish(along)
    except PermissionError as error:
        pytest.skip(f"no network namespaces here: {error}")
    assert "train: built" in out
    assert "waits for node 0" in other
    assert "train: done; node 0 publishes it" in other
    assert losses(artifact(folder)) == losses(one_machine)
    assert weights_hash(artifact(folder)) == weights_hash(one_machine)
    assert len(list((artifact(folder) / "checkpoint").glob("global_step*/*optim_states.pt"))) == 2


@pytest.mark.slow
@pytest.mark.timeout(2 * RUN_TIMEOUT)
def test_tasks_of_srun_train_the_weights_of_torchrun(one_machine: Path, tiny_model: Path, tmp_path: Path) -> None:
    why = missing()
    if why is not None:
        pytest.skip(why)
    folder = make_folder(tmp_path / "run", tiny_model)
    with slurm(tmp_path / "slurm") as environment:
        process = start(folder, "--launcher", "slurm", before=("srun", "-n", "2"), environment=environment)
        out, _ = finish(process)
    assert "train: built" in out
    assert "train: done; node 0 publishes it" in out
    assert losses(artifact(folder)) == losses(one_machine)
    assert weights_hash(artifact(folder)) == weights_hash(one_machine)
