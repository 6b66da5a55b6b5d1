"""The same bytes from one process, from two, and from Prefect tasks on a Dask cluster of two workers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sft_core.recipe.sections import ComputeConfig
from tasks.shard_mapping import SHARDS_A_TASK, shard_mapper

ROOT = Path(__file__).parents[2]
RUN_SECONDS = 280
"""Bound on all three; on two idle cores it takes about a minute, most of it starts of servers and workers."""


@pytest.mark.slow
def test_the_same_bytes_here_in_processes_and_on_dask(tmp_path: Path, tiny_model: Path) -> None:
    pytest.importorskip("prefect_dask")
    (tmp_path / "work").mkdir()
    environment = {**os.environ, "PREFECT_HOME": str(tmp_path / "prefect"), "PYTHONPATH": str(ROOT)}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PREFECT_LOGGING_LEVEL": "ERROR"}
    environment.pop("PREFECT_API_URL", None)
    done = subprocess.run(
        [
            sys.executable,
            str(Path(__file__).with_name("prepare_everywhere.py")),
            str(tmp_path / "work"),
            str(tiny_model),
        ],
        env=environment,
        capture_output=True,
        text=True,
        timeout=RUN_SECONDS,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    hashes = seen["hashes"]
    assert any(name.startswith("p/sequences/") for name in hashes["here"])
    assert hashes["processes"] == hashes["here"]
    assert hashes["dask"] == hashes["here"]
    assert seen["shards"] > SHARDS_A_TASK
    assert seen["task_runs"] == 2 * -(-seen["shards"] // SHARDS_A_TASK)  # normalize's and pack's


def test_one_process_is_plain_map() -> None:
    with shard_mapper(ComputeConfig(num_proc=1)) as mapper:
        assert mapper is map
