"""Whether a flow-run process can load its flow in a user's folder: asked when a stack starts, not by the first run.

In: the folder, prefect.yaml. Out: nothing, or a ServerError that says which flow, why, and which files are in the way.
The flows are loaded as a run loads them: by Prefect's loader, with the folder first on the path, in a new process.
"""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from cli.servers import ServerError
from sft_core.own_packages import NAMES, find_collision
from sft_core.yaml_text import read_yaml

SECONDS = 600.0
"""Bound on loading; 5 s on an idle machine."""
LOAD = """
import sys
from prefect.flows import load_flow_from_entrypoint
for entrypoint in sys.argv[1:]:
    try:
        load_flow_from_entrypoint(entrypoint, use_placeholder_flow=False)
    except (Exception, SystemExit) as error:
        sys.exit(f"{entrypoint}: {type(error).__name__}: {error}")
"""


def start_loading(project: Path, prefect_file: Path, environment: Mapping[str, str]) -> "subprocess.Popen[str]":
    """Begin; it takes seconds of one core, beside the start of the servers."""
    places = os.pathsep.join([str(project), *filter(None, [environment.get("PYTHONPATH")])])
    return subprocess.Popen(
        [sys.executable, "-c", LOAD, *our_entrypoints(prefect_file)],
        cwd=project,
        env={**environment, "PYTHONPATH": places},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish_loading(loading: "subprocess.Popen[str]", project: Path) -> None:
    """Wait for it. ServerError where a flow was not loaded."""
    said = loading.communicate(timeout=SECONDS)[1].strip()
    if loading.returncode == 0:
        return
    last = (said.splitlines() or [f"status {loading.returncode}"])[-1]
    in_the_way = [str(found) for name in NAMES if (found := find_collision(name)) is not None]
    way_out = ["Or take the entrypoints of the prefect.yaml that ships: sft_cli.deployments.NAME"] if in_the_way else []
    raise ServerError("\n".join([f"a run in {project} could not load its flow: {last}", *in_the_way, *way_out]))


def our_entrypoints(prefect_file: Path) -> list[str]:
    """Those of prefect.yaml that are flows of ours, each once. Whether a user's own can be loaded is the user's affair.

    >>> our_entrypoints(Path("flows/prefect.yaml"))[:2]
    ['sft_cli.deployments.retrain', 'sft_cli.deployments.prepare']
    """
    deployments = read_yaml(prefect_file.read_text("utf-8")).get("deployments") or []
    entrypoints = dict.fromkeys(str(deployment.get("entrypoint")) for deployment in deployments)
    return [entry for entry in entrypoints if entry.partition(".")[0] in ("flows", "sft_cli")]
