"""Processes that use a new MLflow database at the same moment all find it made."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROCESSES = 4
SECONDS = 250
FIRST_USE = """
import os, sys
from mlflow.store.tracking import sqlalchemy_store  # slow to import, so once: the processes are forked behind it
from tasks.patience import new_client
gate, opened = os.pipe()
children = []
for _ in range(int(sys.argv[1])):
    children.append(os.fork())
    if not children[-1]:
        try:
            os.close(opened)
            os.read(gate, 1)  # until nobody has the other end
            print(len(new_client().search_experiments()), new_client().search_registered_models(), flush=True)
            os._exit(0)
        finally:
            os._exit(1)
os.close(opened)
sys.exit(sum(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
"""


@pytest.mark.slow
def test_several_first_uses_at_once(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FIRST_USE, str(PROCESSES)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": "sqlite:///mlflow.db"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == ["1 []"] * PROCESSES, done.stderr[-2000:]
    assert (tmp_path / ".mlflow.db.lock").is_file()
