"""`sft deploy`: register deployments and automations with a Prefect server, and see that schedules will fire.

In: PREFECT_API_URL, `prefect.yaml`. Out: exit status 0 once each active schedule has its next run.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.local_stack import DEPLOY_SECONDS, deploy_command, deploy_environment, prefect_file
from cli.servers import ServerError
from sft_core.terminal import say

if TYPE_CHECKING:
    from tasks.upcoming import NextRun


def deploy(
    prefect_file_: Annotated[
        Path | None,
        typer.Option("--prefect-file", metavar="FILE", help="./prefect.yaml by default, else the one that ships."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Register nothing; only look at the active schedules.")
    ] = False,
    wait: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="How long the server may take to plan the runs.")
    ] = 120,
) -> None:
    """Register the deployments and automations with the server of PREFECT_API_URL, and check that schedules will fire.

    Their work pools must be there. Waits until the server has planned the next run of every active schedule, and prints
    it. Exit status 1 if one has none.
    """
    if "PREFECT_API_URL" not in os.environ:
        raise ServerError("PREFECT_API_URL is not set: name your Prefect server, such as http://HOST:4200/api")
    if not check:
        file = prefect_file_ or prefect_file(Path.cwd())
        if not file.is_file():
            raise ServerError(f"--prefect-file {file}: there is no such file")
        _require_pools(file)
        _register(file)
    found = scheduled_runs(wait, "the Prefect server's own log says why")
    say("\n".join(run.words for run in found) or "no schedule is switched on")


def scheduled_runs(seconds: float, where: str) -> "list[NextRun]":
    """The next run of each active schedule, waited for. ServerError naming those that have none; `where` to look."""
    from tasks.upcoming import wait_for_next_runs

    found = wait_for_next_runs(seconds)
    if missing := [f"{run.deployment} ({run.schedule})" for run in found if run.missing]:
        raise ServerError(
            f"no run is planned of {', '.join(missing)}: the schedule is on, and the Prefect server has made no run of "
            f"it in {seconds:.0f} s, so it will not fire; {where}. Its SQLAlchemy must be below 2.1, and "
            "PREFECT_SERVER_SERVICES_SCHEDULER_ENABLED not false"
        )
    return found


def _require_pools(file: Path) -> None:
    """`prefect deploy` only notes that a pool is not there, and nobody would run the deployment."""
    import yaml
    from prefect.client.orchestration import get_client

    from sft_core.yaml_text import read_yaml

    try:
        deployments = (read_yaml(file.read_text("utf-8")) or {}).get("deployments") or []
        wanted = {pool["name"] for entry in deployments if (pool := entry.get("work_pool")) and pool.get("name")}
    except (yaml.YAMLError, AttributeError, TypeError) as error:
        raise ServerError(f"{file} is not Prefect's deployment file: {error}") from None
    with get_client(sync_client=True) as client:
        absent = sorted(wanted - {pool.name for pool in client.read_work_pools()})
    if absent:
        commands = "; ".join(f"prefect work-pool create {name} --type process" for name in absent)
        raise ServerError(f"{file} names work pools that the server does not have; make them first: {commands}")


def _register(file: Path) -> None:
    from tasks.automations import heartbeat_frequency, register_automations

    done = subprocess.run(
        [sys.executable, "-m", *deploy_command(file)],
        env=deploy_environment(os.environ),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=DEPLOY_SECONDS,
    )
    if done.returncode:
        end = "\n".join(done.stdout.splitlines()[-30:])
        raise ServerError(f"registering {file} failed, status {done.returncode}:\n{end}")
    names = register_automations(heartbeat_frequency())
    say(f"registered {file} and the automations {', '.join(names)}")
