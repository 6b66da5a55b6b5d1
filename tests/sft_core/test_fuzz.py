"""A short run of `benchmarks/fuzz.py`, with a fixed seed: whatever comes in ends in a result or in one line."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECONDS = 300
"""Bound on it; 20 s of attacks, and the imports."""


@pytest.mark.slow
def test_hostile_input_ends_in_a_result_or_one_line():
    command = [sys.executable, str(ROOT / "benchmarks" / "fuzz.py"), "--seconds", "20", "--seed", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    for kind in ("recipes", "rows", "manifests", "checkpoints"):
        (line,) = (line for line in done.stdout.splitlines() if line.startswith(f"{kind}: "))
        assert int(line.split()[1]) > 10, line
