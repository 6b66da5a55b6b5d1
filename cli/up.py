"""`sft up`: a Prefect server, an MLflow server and a worker of each pool, for one folder, until Ctrl-C.

In: the current folder, with recipes and rows. Out: servers whose data is in `.sft/` of it, kept for the next `sft up`.
"""

import contextlib
import fcntl
import ipaddress
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.deploy import scheduled_runs
from cli.loading import finish_loading, start_loading
from cli.local_stack import (
    FORM,
    POOLS,
    Stack,
    finish_deploy,
    form_id,
    make_automations,
    make_pools,
    pause_pools,
    prefect_file,
    resume_pools,
    start_deploy,
)
from cli.server_watch import ServerWatch
from cli.servers import (
    HOST,
    LOOK_SECONDS,
    ServerError,
    end_marked,
    is_free,
    last_lines,
    marked,
    send,
    start_mlflow,
    start_prefect,
    start_worker,
    wait_for,
)
from sft_core import stop
from sft_core.terminal import say

if TYPE_CHECKING:
    from tasks.upcoming import NextRun

SAVE_SECONDS = 40.0
"""How long a run that was told to end may save; Prefect's own grace is 30 s."""
SCHEDULED_SECONDS = 120.0
"""Bound on the server's planning of the next run of each active schedule: its scheduler looks every minute."""


def up(
    prefect_port: Annotated[int, typer.Option(metavar="PORT", help="Where the Prefect server listens.")] = 4200,
    mlflow_port: Annotated[int, typer.Option(metavar="PORT", help="Where the MLflow server listens.")] = 5000,
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Address to listen on. The servers ask for no password.")
    ] = HOST,
    drain: Annotated[
        float, typer.Option(metavar="SECONDS", help="How long runs may go on after Ctrl-C before they are told to end.")
    ] = 30,
    print_env: Annotated[
        bool, typer.Option("--print-env", help='Print the lines for other terminals: eval "$(sft up --print-env)".')
    ] = False,
) -> None:
    """Start a local stack in this folder: Prefect server, MLflow server, workers; Ctrl-C stops all of it.

    Data and logs are kept in ./.sft, so the next sft up goes on where this one ended. The deployments come from
    ./prefect.yaml, else from the one that ships. Exit status: 0 stopped by Ctrl-C or SIGTERM, 1 something failed.
    """
    stack = Stack(Path.cwd(), host, prefect_port, mlflow_port)
    file = stack.folder / "env"
    if print_env:
        say(file.read_text() if file.is_file() else stack.exports, end="")
        return
    stop.leave()  # Ctrl-C has stages of its own here
    with _only_one(stack):
        _check_ports(stack)
        file.write_text(stack.exports)
        for number in (signal.SIGINT, signal.SIGTERM):  # a shell's `sft up &` has SIGINT ignored, here and in workers
            signal.signal(number, signal.default_int_handler)
        try:
            _start(stack)
            _watch(stack)
        except KeyboardInterrupt:
            say("\nstopping")
        finally:
            _stop(stack, drain)
            file.unlink()
    say("stopped; the data is kept in .sft")


def _start(stack: Stack) -> None:
    new = not (stack.folder / "prefect").exists()
    say(f"starting Prefect and MLflow{' (the first time: about a minute)' if new else ''}")
    environment = stack.environment()
    stack.server_log.skip()
    stack.servers.append(start_prefect(stack.folder, stack.prefect_port, environment, stack.host))
    stack.servers.append(start_mlflow(stack.folder, stack.mlflow_port, environment, host=stack.host))
    loading = start_loading(stack.project, prefect_file(stack.project), environment)
    os.environ.update(environment)  # before Prefect is imported here
    wait_for(stack.servers[0], f"{stack.prefect_url}/api/health")
    make_pools()
    resume_pools(stack.folder)
    make_automations()
    finish_loading(loading, stack.project)
    deploy = start_deploy(stack.project, stack.folder, environment)
    if deploy is not None:
        say("registering the deployments")
        finish_deploy(deploy, stack.project, stack.folder)
    for pool, limit in POOLS.items():
        stack.workers.append(start_worker(pool, stack.folder, environment, limit))
    wait_for(stack.servers[1], f"{stack.mlflow_url}/health")
    _print_ready(stack, scheduled_runs(SCHEDULED_SECONDS, f"{stack.servers[0].log} may say why"))


def _print_ready(stack: Stack, scheduled: "list[NextRun]") -> None:
    schedules = "\n  ".join(run.words for run in scheduled) or "none is switched on (retrain/nightly: in its page)"
    say(
        f"""
  Prefect   {stack.prefect_url}   runs, schedules, the form
  MLflow    {stack.mlflow_url}   models, metrics, reports
  data      {stack.folder}   (logs/ has what each process printed)

Schedules:
  {schedules}

Start a retraining with the form:
  {stack.prefect_url}/deployments/deployment/{form_id()}/run
or from another terminal in this folder:
  eval "$(sft up --print-env)"
  prefect deployment run {FORM} --param recipe=RECIPE.yaml
The first of these two lines stands for:
  {stack.exports.rstrip().replace(chr(10), chr(10) + "  ")}

Ctrl-C stops everything.""",
        flush=True,
    )


def _watch(stack: Stack) -> None:
    """Until Ctrl-C, or until a process of the stack ends. Says when Prefect's server does not do its own work."""
    watch = ServerWatch(stack.server_log)
    while True:
        for words in watch.look():
            say(f"warning: {words}", to_stderr=True)
        for process in stack.servers + stack.workers:
            if not process.running:
                raise ServerError(
                    f"{process.name} ended with status {process.popen.returncode}; the rest is being stopped. "
                    f"The end of {process.log}:\n{last_lines(process.log)}"
                )
        time.sleep(LOOK_SECONDS)


def _stop(stack: Stack, drain: float) -> None:
    """No new runs; those in progress may end, then must. Each further Ctrl-C, and each bound, goes one stage harder."""
    stages = (lambda: _drain(stack, drain), lambda: _end_runs(stack), lambda: _end_servers(stack))
    for stage in stages:
        with contextlib.suppress(KeyboardInterrupt):
            stage()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # nothing is left that could take long
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for process in stack.workers + stack.servers:
        process.kill()
    end_marked(stack.folder)


def _drain(stack: Stack, seconds: float) -> None:
    runs = _runs(stack)
    if not runs or not stack.servers[0].running:
        return
    say(f"{len(runs)} run(s) may go on for {seconds:.0f} s; Ctrl-C again tells them to end now")
    pause_pools(stack.folder)  # a worker that is told to end takes its runs with it at once
    _wait_ended(stack, seconds)


def _end_runs(stack: Stack) -> None:
    for pid in (runs := _runs(stack)):
        send(pid, signal.SIGTERM)
    if runs:
        say(f"{len(runs)} run(s) were told to end; a training saves its checkpoint first")
        _wait_ended(stack, SAVE_SECONDS)


def _end_servers(stack: Stack) -> None:
    for process in stack.workers + stack.servers:
        process.stop()


def _runs(stack: Stack) -> list[int]:
    """Processes of flow runs: the workers' children."""
    workers = {worker.popen.pid for worker in stack.workers}
    return [pid for pid, parent in marked(stack.folder).items() if parent in workers]


def _wait_ended(stack: Stack, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while _runs(stack) and time.monotonic() < deadline:
        time.sleep(LOOK_SECONDS)


@contextlib.contextmanager
def _only_one(stack: Stack) -> Iterator[None]:
    """The folder's lock; what a killed `sft up` left running here is ended first."""
    stack.folder.mkdir(exist_ok=True)
    (stack.folder / ".gitignore").write_text("*\n")
    with (stack.folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ServerError(f"another sft up runs in {stack.project}; stop it, or use another folder") from None
        if ended := end_marked(stack.folder):
            say(f"ended {ended} process(es) that an earlier sft up left here", to_stderr=True)
        yield


def _check_ports(stack: Stack) -> None:
    with contextlib.suppress(ValueError):
        if ipaddress.ip_address(stack.host).is_unspecified:
            raise ServerError(f"--host {stack.host}: name the one address by which other machines reach this one")
    if stack.prefect_port == stack.mlflow_port:
        raise ServerError(f"port {stack.prefect_port} is named twice; --prefect-port and --mlflow-port must differ")
    for name, port in (("prefect", stack.prefect_port), ("mlflow", stack.mlflow_port)):
        if not is_free(port, stack.host):
            raise ServerError(f"port {port} of {stack.host} is taken; choose another with --{name}-port PORT")
