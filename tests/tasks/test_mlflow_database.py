"""Processes that use a new MLflow database at the same moment all find it made."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROCESSES = 4
SECONDS = 250
FIRST_USE = """
import sys, time
from pathlib import Path
from mlflow.store.tracking import sqlalchemy_store  # slow to import
from tasks.patience import new_client
Path(sys.argv[1]).touch()
while not Path("go").exists():
    time.sleep(0.01)
print(len(new_client().search_experiments()), new_client().search_registered_models())
"""


@pytest.mark.slow
def test_several_first_uses_at_once(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": "sqlite:///mlflow.db"}
    command = [sys.executable, "-c", FIRST_USE]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [
        subprocess.Popen([*command, str(number)], cwd=tmp_path, env=environment, **streams)  # type: ignore[call-overload]
        for number in range(PROCESSES)
    ]
    deadline = time.monotonic() + SECONDS
    while len([*tmp_path.glob("[0-9]")]) < PROCESSES and time.monotonic() < deadline:
        time.sleep(0.1)
    (tmp_path / "go").touch()
    said = [process.communicate(timeout=SECONDS) for process in started]
    assert [out.strip() for out, _ in said] == ["1 []"] * PROCESSES, [err[-500:] for _, err in said]
    assert (tmp_path / ".mlflow.db.lock").is_file()
