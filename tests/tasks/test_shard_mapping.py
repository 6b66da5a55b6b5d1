"""The same bytes from one process, from two, and from Prefect tasks on a Dask cluster of two workers."""

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cli.servers import HOST, free_port, start_prefect, wait_for
from sft_core.recipe.sections import ComputeConfig
from tasks.shard_mapping import SHARDS_A_TASK, shard_mapper

ROOT = Path(__file__).parents[2]
RUN_SECONDS = 800
"""Bound on all three; on two idle cores it takes half a minute, most of it starts of servers and workers."""
WORKERS, ROWS = 2, 2000
MAPS = """
def turn(row):
    return {"conversation": [{"input": row["ask"], "output": row["say"]}]}
"""


@pytest.mark.slow
@pytest.mark.timeout(RUN_SECONDS + 60)
def test_the_same_bytes_here_in_processes_and_on_dask_by_a_users_map_fn_in_tasks(
    tmp_path: Path, tiny_model: Path
) -> None:
    """The workers were started in the user's folder, which comes first on their path and has a package `tasks`."""
    pytest.importorskip("prefect_dask")
    write_users_folder(tmp_path)
    environment = {**os.environ, "PREFECT_HOME": str(tmp_path / "prefect"), "OMP_NUM_THREADS": "1"}
    environment |= {"HF_HUB_OFFLINE": "1", "PREFECT_LOGGING_LEVEL": "ERROR"}
    port = free_port()
    environment |= {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "PREFECT_API_URL": f"http://{HOST}:{port}/api"}
    server = start_prefect(tmp_path, port, environment)
    places: dict[str, Any] = {"cwd": tmp_path, "env": environment}
    dask, file = [sys.executable, "-m", "dask"], ["--scheduler-file", str(tmp_path / "scheduler.json")]
    commands = [["scheduler", "--port", "0", "--no-dashboard"], *[["worker", "--no-nanny", "--no-dashboard"]] * WORKERS]
    cluster = [subprocess.Popen([*dask, *command, *file], **places) for command in commands]
    try:
        wait_for(server, f"http://{HOST}:{port}/api/health")
        script = str(Path(__file__).with_name("prepare_everywhere.py"))
        done = subprocess.run(
            [
                sys.executable,
                script,
                str(tiny_model),
                "tasks.maps:turn",
                scheduler_address(tmp_path / "scheduler.json"),
            ],
            capture_output=True,
            text=True,
            timeout=RUN_SECONDS,
            **places,
        )
    finally:
        for process in cluster:
            process.kill()
            process.wait()
        server.stop()
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert 0.9 * ROWS < seen["rows"]["dask"] < ROWS
    hashes = seen["hashes"]
    assert any(name.startswith("p/sequences/") for name in hashes["here"])
    assert hashes["processes"] == hashes["here"]
    assert hashes["dask"] == hashes["here"]
    assert seen["shards"] > SHARDS_A_TASK
    assert seen["task_runs"] == 2 * -(-seen["shards"] // SHARDS_A_TASK)  # normalize's and pack's


def write_users_folder(folder: Path) -> None:
    """A package `tasks` with a map_fn, and rows, a few of them of no use."""
    (folder / "tasks").mkdir()
    (folder / "tasks" / "__init__.py").write_text("")
    (folder / "tasks" / "maps.py").write_text(MAPS)
    drawn = random.Random(0)
    rows = [{"ask": f"say {n}", "say": f"{drawn.random()} {n}" if n % 97 else ""} for n in range(ROWS)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def scheduler_address(file: Path) -> str:
    """What Dask's scheduler writes when it listens."""
    deadline = time.monotonic() + RUN_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
            return str(json.loads(file.read_text())["address"])
        time.sleep(0.2)
    raise AssertionError("Dask's scheduler did not start")


def test_one_process_is_plain_map() -> None:
    with shard_mapper(ComputeConfig(num_proc=1)) as mapper:
        assert mapper is map
