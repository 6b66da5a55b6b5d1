"""The same bytes from one process, from two, and from Prefect tasks on a Dask cluster of two workers."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cli.servers import HOST, free_port, start_prefect, wait_for
from sft_core.recipe.sections import ComputeConfig
from tasks.shard_mapping import SHARDS_A_TASK, shard_mapper

ROOT = Path(__file__).parents[2]
RUN_SECONDS = 800
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


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_users_map_fn_in_tasks_is_found_on_dask_workers(tmp_path: Path) -> None:
    """The workers were started in the user's folder, which comes first on their path and has a package `tasks`."""
    pytest.importorskip("prefect_dask")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "__init__.py").write_text("")
    (tmp_path / "tasks" / "maps.py").write_text("def turn(row):\n    return {'text': row['q']}\n")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"q": f"word {n}"}) + "\n" for n in range(60)))
    environment = {**os.environ, "PREFECT_HOME": str(tmp_path / "prefect"), "OMP_NUM_THREADS": "1"}
    port = free_port()
    environment |= {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "PREFECT_API_URL": f"http://{HOST}:{port}/api"}
    server = start_prefect(tmp_path, port, environment)
    places, plain = ["--scheduler-file", str(tmp_path / "scheduler.json")], {"cwd": tmp_path, "env": environment}
    dask = [sys.executable, "-m", "dask"]
    scheduler = subprocess.Popen([*dask, "scheduler", "--port", "0", "--no-dashboard", *places], **plain)
    worker = subprocess.Popen([*dask, "worker", "--no-nanny", "--no-dashboard", *places], **plain)
    try:
        wait_for(server, f"http://{HOST}:{port}/api/health")
        script = str(Path(__file__).with_name("normalize_on_dask.py"))
        address = scheduler_address(tmp_path / "scheduler.json")
        done = subprocess.run(
            [sys.executable, script, address, "tasks.maps:turn"],
            capture_output=True,
            text=True,
            timeout=2 * RUN_SECONDS,
            **plain,
        )
        assert "rows out 60" in done.stdout, done.stderr[-3000:]
    finally:
        for process in (worker, scheduler):
            process.kill()
            process.wait()
        server.stop()


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
