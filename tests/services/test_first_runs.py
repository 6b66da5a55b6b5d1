"""Several `sft run`s at once in one folder and one home: one makes the databases, the others come right after it."""

import os
import subprocess
import sys
from pathlib import Path

from tests.services.stack import RECIPE, ROOT, RUN_SECONDS, write_project

THREE = ("a", "b", "c")


def at_once(folder: Path) -> list[int]:
    """Start three and wait for all; their exit status. What they printed is in `<name>.log`."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_"))}
    environment = {**inherited, "PYTHONPATH": str(ROOT), "PREFECT_HOME": str(folder / "home")}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "150"}
    processes = []
    for name in THREE:
        with (folder / f"{name}.log").open("wb") as log:
            command = [sys.executable, "-m", "sft_cli", "run", f"{name}.yaml"]
            pipes = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
            processes.append(subprocess.Popen(command, cwd=folder, env=environment, **pipes))  # type: ignore[call-overload]
    return [process.wait(3 * RUN_SECONDS) for process in processes]


def test_all_end_well(tmp_path: Path, tiny_model: Path) -> None:
    """Two of them are the same retraining."""
    folder = write_project(tmp_path, tiny_model)
    for file, name in zip(THREE, ("one", "same", "same"), strict=True):
        (folder / f"{file}.yaml").write_text(RECIPE.replace("name: orders", f"name: {name}"))
    statuses = at_once(folder)
    ends = {name: (folder / f"{name}.log").read_text("utf-8")[-1500:] for name in THREE}
    assert statuses == [0, 0, 0], ends
    assert all("Traceback" not in end for end in ends.values()), ends
