"""Prefect's side of an approval: the event that asks for it, the flow run that waits, the one that ends the wait.

In: a registered version, a flow run's id. Out: an event, a scheduled flow run, a run ended where it is suspended.
"""

from typing import Any
from uuid import UUID, uuid5

from prefect import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterIdempotencyKey
from prefect.events import emit_event
from prefect.exceptions import ObjectNotFound
from prefect.runtime import deployment
from prefect.states import Cancelled, Scheduled

from tasks.approval import Approval
from tasks.registry import JUDGED_AGAINST, RUN, RegisteredVersion

PASSED = "sft.gate.passed"
"""Event: a version passed the gate and waits for approval. Its resource is `mlflow.model.NAME`."""
EVENTS = UUID("5b1f0a57-6c0f-4d1e-9a57-2f0d3c8f7a11")
"""Name space: one event id a version, so that a retry sends the same event again."""


def announce(model_name: str, version: RegisteredVersion, approval: Approval) -> None:
    """Send the event that starts `promote/on-approval`."""
    emit_event(
        event=PASSED,
        resource={"prefect.resource.id": f"mlflow.model.{model_name}", "prefect.resource.name": model_name},
        payload={
            "model_name": model_name,
            "version": version.number,
            "champion": version.tags[JUDGED_AGAINST],
            "verdict": version.verdict,
            "until": approval.until.isoformat(),
            "mlflow_run_id": version.tags.get(RUN, ""),
        },
        id=uuid5(EVENTS, f"{model_name}/{version.number}/{version.merged_fingerprint}"),
    )


def is_open(run_id: str) -> bool:
    """Whether that flow run is there and not at its end."""
    with get_client(sync_client=True) as prefect:
        try:
            state = prefect.read_flow_run(UUID(run_id)).state
        except ObjectNotFound:
            return False
    return state is not None and not state.is_final()


def end_run(run_id: str | None, name: str, message: str) -> None:
    """End a flow run that waits for an answer which nobody needs any more; one that does not wait is left alone."""
    if run_id is None:
        return
    with get_client(sync_client=True) as prefect:
        try:
            state = prefect.read_flow_run(UUID(run_id)).state
        except ObjectNotFound:  # of another server, or deleted
            return
        if state is not None and state.is_paused():
            prefect.set_flow_run_state(UUID(run_id), Cancelled(name=name, message=message))


def schedule_deadline(parameters: dict[str, Any], run_id: str, approval: Approval) -> None:
    """One more run of this deployment when the time is up: it notes that nobody answered, and ends this one."""
    with get_client(sync_client=True) as prefect:
        prefect.create_flow_run_from_deployment(
            UUID(str(deployment.id)),
            parameters=parameters,
            state=Scheduled(scheduled_time=approval.until),
            idempotency_key=_deadline_key(run_id),
            tags=["deadline"],
        )


def drop_deadline(run_id: str) -> None:
    """An answer came: nothing is to be done when the time is up."""
    wanted = FlowRunFilter(idempotency_key=FlowRunFilterIdempotencyKey(any_=[_deadline_key(run_id)]))
    with get_client(sync_client=True) as prefect:
        for run in prefect.read_flow_runs(flow_run_filter=wanted):
            if run.state is not None and run.state.is_scheduled():
                prefect.set_flow_run_state(run.id, Cancelled(message="an answer came in time"))


def _deadline_key(run_id: str) -> str:
    return f"deadline-{run_id}"
