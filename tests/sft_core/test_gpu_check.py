"""The script for a first card, at toy size on a CPU: every stage runs, and its figures agree with one another."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_check.py"
RUN_SECONDS = 850.0
LADDER = [
    "PEFT, dropout, all recomputed",
    "nothing recomputed",
    "all recomputed, dropout 0",
    "+ LoRA by addmm",
    "all that, nothing recomputed, 1 rows",
    "all that, nothing recomputed, 2 rows",
    "all that, one in 2 recomputed, 4 rows",
    "all that, all recomputed, 4 rows",
]


def run_script(folder: Path, *arguments: str) -> tuple[int, list[dict[str, Any]], str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "OUT": str(folder)}
    command = [sys.executable, "-W", "ignore", str(SCRIPT), *arguments]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=RUN_SECONDS, check=False)
    assert (folder / "check.jsonl").exists(), run.stderr[-3000:]
    lines = [json.loads(line) for line in (folder / "check.jsonl").read_text("utf-8").splitlines()]
    return run.returncode, lines, run.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_stage_runs(tmp_path: Path) -> None:
    status, lines, printed = run_script(tmp_path, "--toy", "--seconds", "800")
    assert [line for line in lines if "FAULT" in line or "fault" in line] == []
    assert status == 0
    stages = [line["stage"] for line in lines if "seconds" in line and "step" not in line and "run" not in line]
    assert stages == ["facts", "attention", "ladder", "product", "peers", "nf4", "head"]
    ladder = {line["variant"]: line for line in lines if line["stage"] == "ladder" and "variant" in line}
    assert list(ladder) == LADDER
    for name, line in ladder.items():
        assert line["tok_s"] > 0, name
        assert line["forecast_tok_s"] > 0, name
        assert line["forecast_peak_gib"] >= 0, name
        assert f"{name} " in printed, "it is in the table"
    losses = [ladder[name]["loss"] for name in LADDER[2:]]  # without dropout
    assert max(losses) - min(losses) < 1e-2 * min(losses)
    (same,) = (line["same_bits"] for line in lines if line["stage"] == "product" and "same_bits" in line)
    assert same == {"resumed": True}  # on a CPU
    runs = {line["run"]: line for line in lines if "run" in line}
    assert set(runs) == {"first", "resumed", "auto"}
    chosen = runs["auto"]["facts"]
    assert chosen["per_device_train_batch_size"] * chosen["gradient_accumulation_steps"] == 4
    assert [line["step"] for line in lines if "step" in line] == ["merge", "evaluate", "chat"]


@pytest.mark.slow
def test_a_stage_that_fails_costs_itself_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage that raises is a line with its reason; the next one runs; the exit status tells."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    monkeypatch.setenv("OUT", str(tmp_path))
    import gpu_check
    import gpu_check_kernels

    def attention(bench: Any) -> dict[str, Any]:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(gpu_check_kernels, "attention", attention)
    assert gpu_check.main(["--toy", "--only", "attention,nf4"]) == 1
    lines = [json.loads(line) for line in (tmp_path / "check.jsonl").read_text("utf-8").splitlines()]
    assert [line["stage"] for line in lines] == ["attention", "nf4"]
    assert lines[0]["FAULT"] == "RuntimeError('no such kernel')"
    assert lines[1]["weights_off_a_cpu"] == 0.0
