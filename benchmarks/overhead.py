"""What Prefect, MLflow and workers cost: `python benchmarks/overhead.py`, by hand, on a quiet machine.

In: the demo (or `--tiny`, the tests' model). Out: for a retraining started through the API of a local stack whose
worker waits for work, in seconds from the creation of the flow run:

    taken        a worker has taken it (it asks every PREFECT_WORKER_QUERY_SECONDS; 2 here, 5 in deploy/systemd)
    running      its process has imported everything and the flow's first line runs
    first step   the first optimizer step is done; `prepared` of these seconds are the steps before train
    ended        the flow run is in its final state
    register     what the step register took, which writes no artifact: judging, the copy to MLflow, loading it once
    overhead     between running and ended: not spent in a step's work, as the steps' manifests have it, or in register

and the same for a second run, in which everything is reused: its time is overhead alone.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parents[1]
MANIFESTS = "**/store/*/*/manifest.json"


def main() -> None:
    """Start a stack, run twice, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="the tests' tiny model: seconds of work, so no share")
    parser.add_argument("--query-seconds", default="2", help="between two looks of the worker for work")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from tests.services.stack import Stack

    with tempfile.TemporaryDirectory() as folder:
        recipe = _tiny(Path(folder) / "home") if options.tiny else _demo(Path(folder) / "home")
        stack = Stack(Path(folder) / "home", PREFECT_WORKER_QUERY_SECONDS=options.query_seconds)
        try:
            stack.start()
            stack.worker("cpu")
            stack.prefect("work-pool", "create", "gpu", "--type", "process")  # the file names it
            stack.deploy()
            _warm(stack)
            print("load average", os.getloadavg())
            for name in ("first", "again"):
                print(name, json.dumps(_measure(stack, recipe, name)), "load average", os.getloadavg(), flush=True)
        finally:
            stack.stop()


def _warm(stack: Any) -> None:
    """MLflow's server has several processes, and the first answer of each takes seconds: not a retraining's cost."""
    url = f"{stack.mlflow_url}/api/2.0/mlflow/experiments/get?experiment_id=0"
    with ThreadPoolExecutor(16) as pool:
        statuses = set(pool.map(lambda _: httpx.get(url, timeout=60).status_code, range(160)))
    assert statuses == {200}, statuses


def _measure(stack: Any, recipe: str, name: str) -> dict[str, float]:
    """One retraining from its creation to its end."""
    before = set(stack.folder.glob(MANIFESTS))
    run_id = stack.run_deployment("retrain/on-demand", {"recipe": recipe, "train": {"logging_steps": 1}})
    run = stack.wait_final(run_id)
    assert run["state_name"] == "Completed", stack.logs(run_id)[-5:]
    created, ended = _seconds(run["created"]), _seconds(run["end_time"])
    states = stack.api("GET", f"/flow_run_states/?flow_run_id={run_id}")
    at = {state["type"]: _seconds(state["timestamp"]) - created for state in reversed(states)}
    found = {"taken": at["PENDING"], "running": at["RUNNING"], "ended": ended - created}
    manifests = [json.loads(path.read_text()) for path in set(stack.folder.glob(MANIFESTS)) - before]
    work = sum(manifest["took_seconds"] for manifest in manifests)
    if manifests:
        (metrics,) = stack.folder.glob("**/store/train/*/metrics.jsonl")
        first = json.loads(metrics.read_text().splitlines()[0])
        assert first["optimizer_step"] == 1
        found["first step"] = first["time"] / 1000 - created
        found["prepared"] = sum(m["took_seconds"] for m in manifests if m["step"] in ("fetch", "normalize", "pack"))
    parts = [child["id"] for child in stack.children(run_id)]
    tasks = stack.api("POST", "/task_runs/filter", {"flow_runs": {"id": {"any_": parts}}})
    found["register"] = sum(task["total_run_time"] for task in tasks if task["name"].startswith("register"))
    found["work"] = work
    found["overhead"] = found["ended"] - found["running"] - work - found["register"]
    return {key: round(value, 2) for key, value in found.items()}


def _seconds(stamp: str) -> float:
    return datetime.fromisoformat(stamp.replace("Z", "+00:00")).timestamp()


def _demo(home: Path) -> str:
    """The demo's data and base model in `home`; the recipe's name."""
    from demo.base_model import make_base_model

    shutil.copytree(ROOT / "demo" / "data", home / "demo" / "data")
    make_base_model(home / ".demo" / "base")
    return "demo"


def _tiny(home: Path) -> str:
    from tests.conftest import make_tiny_model
    from tests.services.stack import write_project

    write_project(home, make_tiny_model(home.with_name("tiny")))
    return "recipe.yaml"


if __name__ == "__main__":
    main()
