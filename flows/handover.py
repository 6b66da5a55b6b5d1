"""Hand a part of a retraining over to a deployment's work pool, and wait for it through faults of either side.

In: the part's name, a deployment, the resolved recipe, its plan. Out: nothing, once a flow run of the part completed.

A part's flow run has the idempotency key `sft/<parent flow run>/<part>/<plan>/<attempt>`. A parent that was started
again therefore finds it: one at work is waited for, a completed one is taken, after a dead one comes the next attempt.
"""

import time
from typing import Any
from uuid import UUID

import httpx
from prefect import get_run_logger
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterParentFlowRunId, FlowRunFilterTags
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.runtime import flow_run as this_run
from prefect.states import Cancelling

from flows.waiting import why_waiting
from sft_core.errors import RecipeError, TrainError
from sft_core.plan import Plan
from sft_core.recipe import Recipe
from tasks.ended_runs import end_run

PART_RESTARTS = 2
"""How often a parent starts a crashed part again: training goes on from its newest checkpoint."""
POLL_SECONDS = 2.0
SERVER_GONE_SECONDS = 3600.0
"""So long a parent waits for a Prefect server that does not answer."""
RESUMABLE = "TrainingStopped"
"""In the message of a run whose training was told to stop from outside, by its machine's shutdown perhaps."""


class PartCancelled(TrainError):
    """Someone cancelled a part's flow run: its parent is cancelled with it."""


def hand_over(part: str, deployment: str, recipe: Recipe, plan: Plan) -> None:
    """Have the part done by the deployment.

    PartCancelled if it was cancelled, RecipeError if there is no such deployment, TrainError if it failed, or crashed
    once more than PART_RESTARTS times.
    """
    key = f"sft/{this_run.id}/{part}/{plan.fingerprint[:16]}"
    with get_client(sync_client=True) as client:
        _check(client, part, deployment)
        run = _last_attempt(client, part, key)
        if run is None or _ended_badly(run):
            run = _start(part, deployment, f"{key}/{_attempt(run) + 1}", (recipe, plan))
        for restarts in range(PART_RESTARTS + 1):
            run = _wait(client, run)
            if run.state.is_completed():
                return
            end_run(part, recipe, plan)  # MLflow's, which a killed process has left running
            if restarts == PART_RESTARTS or not _worth_another_attempt(run):
                break
            get_run_logger().warning("%s ended %s: %s", run.name, run.state.name, run.state.message)
            run = _start(part, deployment, f"{key}/{_attempt(run) + 1}", (recipe, plan))
    message = f"{deployment}: flow run {run.name} ended {run.state.name}: {run.state.message}"
    if run.state.is_cancelled():
        raise PartCancelled(message)
    raise TrainError(f"{message}. Retry this run once that is mended: what is done is reused")


def cancel_parts(parent: UUID | str, part: str | None = None, keep: str | None = None) -> list[str]:
    """Ask for the cancellation of a parent's parts that have not ended (of one part; all but those of key `keep`);
    their names."""
    with get_client(sync_client=True) as client:
        unwanted = [
            run
            for run in _parts(client, parent, part)
            if run.state and not run.state.is_final() and not (keep and str(run.idempotency_key).startswith(keep))
        ]
        for run in unwanted:
            client.set_flow_run_state(run.id, Cancelling(message="Not wanted any more by its parent."))
    return [run.name for run in unwanted]


def _check(client: SyncPrefectClient, part: str, deployment: str) -> None:
    try:
        found = client.read_deployment_by_name(deployment)
    except (ObjectNotFound, ValueError):
        raise RecipeError(
            f"compute.{part}: there is no deployment {deployment!r} on {client.api_url}; register it with "
            f"`sft deploy`, or run the part in this process with compute.{part}=null"
        ) from None
    if found.work_pool_name is None:
        raise RecipeError(
            f"compute.{part}: the deployment {deployment!r} has no work pool, so nobody would run it; give it one "
            "in prefect.yaml and register it again"
        )


def _parts(client: SyncPrefectClient, parent: UUID | str, part: str | None) -> list[FlowRun]:
    mine = FlowRunFilter(
        parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[UUID(str(parent))]),
        tags=FlowRunFilterTags(all_=[_tag(part)]) if part else None,
    )
    return [run for run in client.read_flow_runs(flow_run_filter=mine) if run.deployment_id]


def _last_attempt(client: SyncPrefectClient, part: str, key: str) -> FlowRun | None:
    """The newest attempt at this plan. Runs of the same part for another plan (the data has changed since) end."""
    for name in cancel_parts(str(this_run.id), part, keep=key):
        get_run_logger().warning("%s works on data that has changed since; cancelled", name)
    known = [run for run in _parts(client, str(this_run.id), part) if str(run.idempotency_key).startswith(key)]
    return max(known, key=_attempt, default=None)


def _attempt(run: FlowRun | None) -> int:
    return int(str(run.idempotency_key).rpartition("/")[2]) if run is not None else 0


def _tag(part: str) -> str:
    return f"part:{part}"


def _start(part: str, deployment: str, key: str, work: tuple[Recipe, Plan]) -> FlowRun:
    recipe, plan = work
    parameters = {"recipe": recipe.as_dict(), "plan": plan.as_dict()}
    run: Any = run_deployment(
        deployment, parameters=parameters, timeout=0, tags=[_tag(part)], idempotency_key=key, as_subflow=True
    )
    get_run_logger().info("%s: handed over to %s, attempt %s", run.name, deployment, _attempt(run))
    return run


def _wait(client: SyncPrefectClient, run: FlowRun) -> FlowRun:
    """The run once it has ended. Where this process is told to end because its run is cancelled, it cancels its parts
    at once; the hook, which does it too, has a process to start first."""
    try:
        return _wait_final(client, run)
    except BaseException:  # also the signal of a cancellation; raised again below
        me = client.read_flow_run(UUID(str(this_run.id)))
        if me.state is not None and me.state.is_cancelling():
            cancel_parts(me.id)
        raise


def _wait_final(client: SyncPrefectClient, run: FlowRun) -> FlowRun:
    """What it waits for is said once that changes."""
    said, answered, since = "", time.monotonic(), time.monotonic()
    while True:
        try:
            run = client.read_flow_run(run.id)
            word = why_waiting(client, run, time.monotonic() - since)
            answered = time.monotonic()
        except (httpx.HTTPError, PrefectHTTPStatusError) as error:
            if time.monotonic() - answered > SERVER_GONE_SECONDS:
                raise
            word = f"the Prefect server does not answer ({type(error).__name__})"
        if word != said:
            get_run_logger().info("%s: %s", run.name, word)
            said = word
        if run.state is not None and run.state.is_final():
            return run
        time.sleep(POLL_SECONDS)


def _ended_badly(run: FlowRun) -> bool:
    return run.state.is_final() and not run.state.is_completed()


def _worth_another_attempt(run: FlowRun) -> bool:
    return run.state.is_crashed() or (run.state.is_failed() and RESUMABLE in str(run.state.message))
