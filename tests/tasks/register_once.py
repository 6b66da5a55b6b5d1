"""A process that registers one built model: `python -m tests.tasks.register_once NUMBER GATE`.

NUMBER: version in the database of `SFT_BUILT` whose recorded recipe and plan are taken, with the keys of `register`
that SFT_REGISTER holds as JSON. It says `ready`, and starts when the file GATE is there. MLFLOW_TRACKING_URI names the
registry. Prefect's part (logger, artifact, event) is left out.
"""

import json
import os
import sys
import time
from pathlib import Path

import mlflow

GATE_SECONDS = 800


def main(number: str, gate: str) -> None:
    from prefect.logging import disable_run_logger

    from sft_core.plan import Plan
    from sft_core.recipe import resolve
    from tasks import register, tracking
    from tasks.lineage import read_recorded
    from tasks.registry import find_champion, read_version
    from tasks.run_step import Job

    target = os.environ["MLFLOW_TRACKING_URI"]
    mlflow.set_tracking_uri(os.environ["SFT_BUILT"])
    recorded = read_recorded("orders", read_version("orders", number))
    mlflow.set_tracking_uri(target)
    tracking.client.cache_clear()
    changes = {"register": json.loads(os.environ.get("SFT_REGISTER", "{}"))}
    recipe, plan = resolve(recorded.recipe, changes), Plan.from_dict(recorded.plan)
    register.create_markdown_artifact = register.announce = lambda *_, **__: None
    with disable_run_logger(), tracking.part_run("publish", recipe, plan) as part:
        champion = find_champion("orders")
        print("ready", flush=True)
        deadline = time.monotonic() + GATE_SECONDS
        while not Path(gate).exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        job = Job(recipe=recipe, plan=plan, part=part)
        print(register.register.fn(job, champion), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
