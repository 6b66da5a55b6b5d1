"""A retraining whose training lasts long enough to be stopped; looks at its processes, checkpoints, MLflow runs."""

import os
import signal
from pathlib import Path
from typing import Any

from sft_core.plan import plan_recipe
from sft_core.recipe import resolve
from sft_core.steps import Retraining, run_step
from sft_core.store import Store
from tests.services.stack import RECIPE, Stack, wait_until

STEPS, SAVE_STEPS = 400, 20
TRAINING = "sft_core.train.worker"
"""In the command line of every rank, and of torchrun."""
STOPPED = "stopped: saved"
"""A rank's last line after a SIGTERM."""
STARTED_SECONDS = 300.0
"""Bound on the way from a flow run's creation to its first checkpoint."""
GONE_SECONDS = 60.0
"""Bound on the end of processes that were told to end, Prefect's 30 s among it."""


def write_long_recipe(stack: Stack, name: str, num_processes: int = 1, steps: int = STEPS) -> str:
    """A recipe of its own experiment and store, handed over to train/gpu; its file name."""
    text = RECIPE.replace("name: orders", f"name: {name}").replace("./store", f"./store-{name}")
    text = text.replace("logging_steps: 1", f"logging_steps: 10\n  num_processes: {num_processes}")
    text = text.replace("max_steps: 3", f"max_steps: {steps}\n  save_steps: {SAVE_STEPS}")
    (stack.folder / f"{name}.yaml").write_text(text + "compute: {train: train/gpu}\n")
    return f"{name}.yaml"


def store_of(stack: Stack, name: str) -> Path:
    """The store of a recipe of `write_long_recipe`."""
    return stack.folder / f"store-{name}"


def newest_step(store: Path) -> int:
    """Optimizer step of the newest checkpoint that a training left in the store; 0 if there is none."""
    found = [path.parent.name for path in store.glob("train/*/checkpoints/*/checkpoint-*/trainer_state.json")]
    return max((int(name.rpartition("-")[2]) for name in found), default=0)


def wait_for_step(store: Path, step: int) -> int:
    """Until a checkpoint of `step` or later is there; its step."""
    return wait_until(lambda: found if (found := newest_step(store)) >= step else None, STARTED_SECONDS, 0.1)


def times_saved(store: Path) -> int:
    """How often ranks of the training there, told to stop, have said that they had saved."""
    (log,) = store.rglob("train.log")
    return log.read_text().count(STOPPED)


def resumptions(store: Path) -> int:
    """How often the training at work there has gone on from a checkpoint. Its log is on the disk at once; Prefect gets
    lines every two seconds, and those of a process that was killed before that never."""
    (log,) = store.rglob("train.log")
    return sum(line.startswith("resuming from checkpoint-") for line in log.read_text().splitlines())


def train_undisturbed(folder: Path, recipe: str, disturbed: Path) -> Path:
    """The training that ended in the store `disturbed` once more, in one go, without a server, from `folder`, the
    current one; the other store."""
    text = (folder / recipe).read_text()
    assert text.count(f"store: ./{disturbed.name}\n") == 1
    (folder / "whole.yaml").write_text(text.replace(f"store: ./{disturbed.name}\n", "store: ./store-whole\n"))
    resolved = resolve("whole.yaml")
    run = Retraining(resolved, plan_recipe(resolved), Store(resolved.store))
    for step in ("fetch/0", "normalize", "pack", "train", "convert"):
        run_step(run, step)
    return folder / "store-whole"


def wait_for_part(stack: Stack, parent: str, part: str, count: int = 1) -> dict[str, Any]:
    """The newest of `count` or more flow runs of a part, once it runs."""

    def look() -> dict[str, Any] | None:
        runs = attempts(stack, parent, part)
        return runs[-1] if len(runs) >= count and runs[-1]["state_type"] == "RUNNING" else None

    return wait_until(look, STARTED_SECONDS)


def attempts(stack: Stack, parent: str, part: str) -> list[dict[str, Any]]:
    """Flow runs that the parent handed a part over to, first one first."""
    runs = [run for run in stack.children(parent) if run["deployment_id"] and f"part:{part}" in run["tags"]]
    return sorted(runs, key=lambda run: run["created"])


def processes(stack: Stack, word: str = "") -> dict[int, str]:
    """Command lines with `word` of processes that work for this stack, by pid; zombies aside."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            mine = f"SFT_PROJECT_DIR={stack.folder}\0".encode() in (entry / "environ").read_bytes()
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if mine and line and word in line:
            found[int(entry.name)] = line
    return found


def wait_gone(stack: Stack, word: str) -> None:
    """Until no process of the stack has `word` in its command line."""
    wait_until(lambda: not processes(stack, word), GONE_SECONDS)


def kill_flow(run: dict[str, Any]) -> None:
    """SIGKILL to a flow run's process."""
    os.kill(int(run["infrastructure_pid"].rpartition(":")[2]), signal.SIGKILL)


def kill_host(stack: Stack, worker: str) -> None:
    """SIGKILL to a worker and everything that it started, as when its machine loses power."""
    pids = descendants(stack.processes[worker].popen.pid)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    stack.processes.pop(worker).popen.wait()


def descendants(root: int) -> list[int]:
    """A process and all that it started, directly or not; parents first."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    family = [root]
    for pid in family:
        family += [child for child, parent in parents.items() if parent == pid]
    return family


def mlflow_statuses(stack: Stack, name: str) -> dict[str, list[str]]:
    """Statuses of all MLflow runs of a recipe, by part."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(stack.mlflow_url)
    experiment = client.get_experiment_by_name(name)
    found: dict[str, list[str]] = {}
    for run in client.search_runs([experiment.experiment_id]) if experiment else []:
        found.setdefault(run.data.tags["sft.part"], []).append(run.info.status)
    return found
