"""Processes that each register one built model: `python -m tests.tasks.register_once GATE NUMBER...`.

NUMBER: version in the database of `SFT_BUILT` whose recorded recipe and plan are taken. A process says `ready`, and
starts when the file GATE is there. They are forked behind the imports, which take longer than the work.
MLFLOW_TRACKING_URI names the registry. Prefect's part (logger, artifact) is left out.
"""

import os
import sys
import time
import traceback
from pathlib import Path

import mlflow
import mlflow.transformers
import torch  # noqa: F401 - slow to import, as the one above
from prefect.logging import disable_run_logger

from sft_core.plan import Plan
from sft_core.recipe import resolve
from tasks import register, tracking
from tasks.lineage import read_recorded
from tasks.registry import find_champion, read_version
from tasks.run_step import Job

GATE_SECONDS = 800


def register_once(number: str, gate: Path) -> None:
    """In this process."""
    target = os.environ["MLFLOW_TRACKING_URI"]
    mlflow.set_tracking_uri(os.environ["SFT_BUILT"])
    recorded = read_recorded("orders", read_version("orders", number))
    mlflow.set_tracking_uri(target)
    tracking.client.cache_clear()
    recipe, plan = resolve(recorded.recipe), Plan.from_dict(recorded.plan)
    register.show_report = lambda *_: None  # type: ignore[assignment]
    with disable_run_logger(), tracking.part_run("publish", recipe, plan) as part:
        champion = find_champion("orders")
        print("ready", flush=True)
        deadline = time.monotonic() + GATE_SECONDS
        while not gate.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        job = Job(recipe=recipe, plan=plan, part=part)
        print(register.register.fn(job, champion), flush=True)


def main(gate: Path, *numbers: str) -> int:
    """A process a number; how many of them failed."""
    children = []
    for number in numbers:
        children.append(os.fork())
        if not children[-1]:
            try:
                register_once(number, gate)
                os._exit(0)
            except BaseException:  # noqa: BLE001 - said, and counted by the parent
                traceback.print_exc()
            finally:
                os._exit(1)
    return sum(os.waitpid(child, 0)[1] != 0 for child in children)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
