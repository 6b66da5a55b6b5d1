"""A process that works for a flow run which the server has given up ends itself.

In: the flow run of this process. Out: no process that trains for nobody. That happens where a live run was marked
`Crashed` (its signs of life did not come through) or `Cancelled` (its worker was gone, so nobody told the process), and
where the same run was started again elsewhere.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from uuid import UUID

import httpx
from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError

from sft_core import stop
from sft_core.credentials import credentials_hidden
from sft_core.terminal import say

LOOK_SECONDS = 30.0


@contextmanager
def ends_when_unwanted() -> Iterator[None]:
    """Inside, this process is killed (and its training with it) once its deployment's flow run has ended without it,
    and a SIGTERM that something swallowed is raised again.

    Killed, for a process that ends in order reports a state, and would overwrite the one that the server decided on.
    """
    context = FlowRunContext.get()
    run: Any = context.flow_run if context else None
    done = threading.Event()
    if run is not None and run.deployment_id is not None:
        threading.Thread(target=_watch, args=(run.id, done), daemon=True).start()
    try:
        with credentials_hidden(), stop.insisting():
            yield
    finally:
        done.set()


def _watch(run_id: UUID, done: threading.Event) -> None:
    ours: int | None = None
    while not done.wait(LOOK_SECONDS if ours is not None else 0):
        try:
            with get_client(sync_client=True) as client:
                run = client.read_flow_run(run_id)
        except (httpx.HTTPError, PrefectHTTPStatusError, ObjectNotFound, OSError):
            done.wait(1)
            continue  # no server, no word
        ours = run.run_count if ours is None else ours
        given_up = run.state is not None and run.state.is_final()
        if (given_up or run.run_count > ours) and not done.is_set():
            say(f"{run.name}: given up by the server ({run.state}); this process ends", to_stderr=True)
            os.kill(os.getpid(), signal.SIGKILL)
