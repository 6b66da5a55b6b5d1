"""The GPU benchmark at toy size, on whatever device is at hand: every figure, the peer, and the checks after it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "train_gpu.py"
RUN_SECONDS = 800.0


def run_script(*arguments: str) -> list[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "ignore", str(SCRIPT), "--preset", "toy", "--steps", "1", *arguments]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=RUN_SECONDS, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout.splitlines()


@pytest.mark.slow
def test_every_variant_and_the_peer_are_measured_and_share_one_loss() -> None:
    variants = ["baseline", "no-checkpointing", "loss", "attention", "half-norms"]
    lines = run_script("--no-checks", "--variants", *variants)
    measured = [json.loads(line) for line in lines if line.startswith('{"')]
    expected = [(method, variant) for method in ("qlora", "lora") for variant in ("peft", *variants)]
    assert [(one["method"], one["variant"]) for one in measured] == expected
    assert not [one["fault"] for one in measured if one["fault"]]
    assert all(one["tokens_per_second"] > 0 and one["mfu"] > 0 for one in measured)
    for method in ("qlora", "lora"):
        losses = [one["loss"] for one in measured if one["method"] == method]
        assert max(losses) - min(losses) < 1e-3 * min(losses)
    assert not [line for line in lines if "NOT THE BASELINE LOSS" in line]


@pytest.mark.slow
def test_isolation_and_resume_are_checked_afterwards() -> None:
    lines = run_script("--methods", "qlora", "--peer", "none", "--variants", "attention")
    assert sum(line.startswith("isolation, qlora: neighbours move by") for line in lines) == 1
    assert sum(line.startswith("resume, qlora: equal adapters, SHA-256") for line in lines) == 1
