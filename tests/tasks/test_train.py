"""The task train's progress artifact, on a real Prefect server in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

RUN_SECONDS = 800
"""Most of it is the temporary server's start."""
ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_progress_artifact_moves_now_and_then_and_ends_at_100(tmp_path: Path) -> None:
    environment = {**os.environ, "PREFECT_HOME": str(tmp_path / "prefect"), "PYTHONPATH": str(ROOT)}
    environment["PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS"] = "120"
    environment.pop("PREFECT_API_URL", None)
    done = subprocess.run(
        [sys.executable, __file__],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=RUN_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    before, first, at_once, later, ended, reused = json.loads(done.stdout.splitlines()[-1])
    assert before == reused[1:] == []
    assert first == at_once == [["train-my-run", 25.0, "training My_Run: step 1/4  loss 3.0"]]
    assert later == [["train-my-run", 75.0, "training My_Run: step 3/4  loss 1.0"]]
    assert ended == reused == [["train-my-run", 100.0, "training My_Run: step 3/4  loss 1.0"]]
    assert "progress not shown" in done.stderr


def shown_by_a_flow() -> list[list[Any]]:
    """Key, progress and description of all artifacts, after each thing that happens."""
    from prefect import flow, get_client

    from tasks.train import LEAST_SECONDS, Progress

    seen: list[list[Any]] = []

    def look() -> None:
        artifacts = get_client(sync_client=True).read_artifacts()
        seen.append([[artifact.key, artifact.data, artifact.description] for artifact in artifacts])

    @flow
    def train() -> None:
        progress = Progress("My_Run")
        progress("note: attention")
        look()
        progress("step 1/4  loss 3.0")
        look()
        progress("step 2/4  loss 2.0")
        look()
        progress._shown_at -= LEAST_SECONDS
        progress("step 3/4  loss 1.0")
        look()
        progress.end()
        look()
        Progress("reused").end()
        look()
        progress._artifact = uuid4()  # the server knows it no more
        progress.end()

    train()
    return seen


if __name__ == "__main__":
    print(json.dumps(shown_by_a_flow()))
