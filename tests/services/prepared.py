"""What stacks begin with, made once for both processes of `-n 2`: databases with their tables, Prefect's with the pools
`cpu` and `gpu` and all deployments. A first start on nothing is tested by test_up, test_schedules and test_first_runs.
"""

import os
import shutil
from pathlib import Path

import pytest

from sft_core.file_lock import file_lock
from tests.services.stack import Stack

POOLS = ("cpu", "gpu")


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for `begin_with`; do not write to it."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "prepared"
    with file_lock(folder / "lock"):
        if not (folder / "made").exists():
            _make(folder)
            (folder / "made").touch()
    return folder


def begin_with(stack: Stack, prepared: Path) -> Stack:
    """Copy the databases to where the servers of `stack`, not yet started, look for them."""
    home = Path(stack.environment["PREFECT_HOME"])
    home.mkdir(parents=True)
    for file in prepared.glob("stack/prefect/prefect.db*"):
        shutil.copy(file, home)
    shutil.copy(prepared / "stack" / "mlflow.db", stack.folder)
    return stack


def _make(folder: Path) -> None:
    from mlflow.tracking import MlflowClient

    shutil.rmtree(folder / "stack", ignore_errors=True)  # of a process that failed
    (folder / "stack").mkdir()
    stack = Stack(folder / "stack")
    try:
        stack.start_prefect()
        for pool in POOLS:
            stack.prefect("work-pool", "create", pool, "--type", "process")
        stack.deploy()
    finally:
        stack.stop()
    MlflowClient(f"sqlite:///{folder / 'stack' / 'mlflow.db'}").search_experiments()
