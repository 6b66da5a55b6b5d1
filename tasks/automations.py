"""Prefect automations that notice dead runs and start a crashed retraining again.

In: how often flow runs give a sign of life. Out: four automations on the server, the same however often this is done.
`python -m sft_cli.module tasks.automations` does it, with the settings of its environment. They touch only runs with
the tag `sft`.
Source: docs.prefect.io, "How to detect and respond to zombie flows".
"""

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from prefect.automations import AutomationCore, EventTrigger, Posture
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    FlowRunFilterState,
    FlowRunFilterStateName,
    FlowRunFilterTags,
)
from prefect.client.schemas.objects import State, StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.settings.context import get_current_settings

from sft_core.errors import RecipeError
from sft_core.terminal import say

TAG = "sft"
"""Of every deployment here, and of every flow run."""
MISSED_HEARTBEATS = 3
"""So many signs of life a run may miss in a row; a restart of the server costs it one or two."""
START_MINUTES = 30
"""From a worker's taking a run to its first line: a container's image may have to be pulled."""
RESTARTS = 2
"""How often one crashed retraining is started again without being asked."""
RESTART_SECONDS = 120
"""From a crash to the next try. A worker reports a crash twice, the second time after its hooks: a run that was started
again by then was seen to lose its place in the deployment's limit."""
LONGEST_RUN = timedelta(days=90)
NO_HEARTBEAT, NEVER_STARTED = "sft: no heartbeat", "sft: never started"
MARK, RESTART = "sft: mark crashed retraining", "sft: restart marked retraining"
AWAITING_RESTART = "AwaitingRestart"
"""Name of the state, of type CRASHED, between a crash and the next try."""


def register_automations(
    heartbeat_seconds: int, restarts: int = RESTARTS, restart_seconds: int = RESTART_SECONDS
) -> list[str]:
    """Make the automations, or bring them up to date; their names.

    `heartbeat_seconds` is the flow runs' PREFECT_FLOWS_HEARTBEAT_FREQUENCY. A run without a sign of life is marked
    `Crashed` after MISSED_HEARTBEATS times that.
    """
    wanted = [_no_heartbeat(heartbeat_seconds), _never_started(), _mark(restarts), _restart(restart_seconds)]
    with get_client(sync_client=True) as client:
        for automation in wanted:
            known = client.read_automations_by_name(automation.name)
            for twin in known[1:]:
                client.delete_automation(twin.id)
            if known:
                client.update_automation(known[0].id, automation)
            else:
                client.create_automation(automation)
    return [automation.name for automation in wanted]


def starts_again(run_id: UUID) -> bool:
    """Whether the server starts this crashed flow run again, or has done so already."""
    with get_client(sync_client=True) as client:
        run = client.read_flow_run(run_id)
        known = [found for found in client.read_automations_by_name(MARK) if found.enabled]
    if run.deployment_id is None or not known:
        return False
    counts = known[0].trigger.model_dump()["match"]["prefect.run-count"]
    return run.state is None or not run.state.is_crashed() or str(run.run_count) in counts


def restart_forgotten(since: datetime, seconds: float = RESTART_SECONDS + 60) -> list[str]:
    """Start crashed retrainings again that the automations forgot; their names.

    A server on SQLite loses events while it is busy ("database is locked" in its log), and with them a restart. Looked
    at are runs that crashed after `since` and more than `seconds` ago, by the clock of this machine, which must be the
    server's.
    """
    wanted = FlowRunFilter(
        tags=FlowRunFilterTags(all_=[TAG]),
        state=FlowRunFilterState(name=FlowRunFilterStateName(any_=["Crashed", AWAITING_RESTART])),
        deployment_id=FlowRunFilterDeploymentId(is_null_=False),
    )
    latest = datetime.now(UTC) - timedelta(seconds=seconds)
    started = []
    with get_client(sync_client=True) as client:
        flows = FlowFilter(name=FlowFilterName(any_=["retrain"]))
        for run in client.read_flow_runs(flow_filter=flows, flow_run_filter=wanted):
            if run.state is not None and 1 <= run.run_count <= RESTARTS and since < run.state.timestamp < latest:
                again = State(type=StateType.SCHEDULED, name="AwaitingRetry", message="Crashed; started again.")
                client.set_flow_run_state(run.id, again, force=True)
                started.append(run.name)
    return started


def heartbeat_frequency() -> int:
    """Seconds between two signs of life of a flow run, as this process's settings say; RecipeError if none are set."""
    seconds = get_current_settings().flows.heartbeat_frequency
    if seconds is None:
        raise RecipeError(
            "PREFECT_FLOWS_HEARTBEAT_FREQUENCY is empty: a killed run would never be noticed; set it to seconds, "
            "30 or more"
        )
    return seconds


def _no_heartbeat(heartbeat_seconds: int) -> AutomationCore:
    within = MISSED_HEARTBEATS * heartbeat_seconds
    rest = "Completed Failed Crashed Cancelled Cancelling Suspended Paused AwaitingRetry Skipped"
    return _automation(
        NO_HEARTBEAT,
        EventTrigger(
            **_of_one_run(),
            posture=Posture.Proactive,
            after={_event("heartbeat")},
            expect={_event("heartbeat"), *map(_event, rest.split())},
            within=timedelta(seconds=within),
        ),
        _change(StateType.CRASHED, f"No sign of life for {within} s: the process or its machine is gone."),
    )


def _never_started() -> AutomationCore:
    others = (
        "Running Completed Failed Crashed Cancelled Cancelling Scheduled Late AwaitingConcurrencySlot AwaitingRetry"
    )
    return _automation(
        NEVER_STARTED,
        EventTrigger(
            **_of_one_run(),
            posture=Posture.Proactive,
            after=set(map(_event, ("Pending", "Submitting", "InfrastructurePending"))),
            expect=set(map(_event, others.split())),
            within=timedelta(minutes=START_MINUTES),
        ),
        _change(StateType.CRASHED, f"Taken by a worker, not started within {START_MINUTES} min: see the worker's log."),
    )


def _mark(restarts: int) -> AutomationCore:
    """Only a run that was Running since it last crashed: one that cannot be started at all is not tried for ever."""
    match = _of_one_run()
    match["match"]["prefect.run-count"] = [str(count) for count in range(1, restarts + 1)]
    match["match_related"].append({"prefect.resource.role": "flow", "prefect.resource.name": "retrain"})
    return _automation(
        MARK,
        EventTrigger(
            **match,
            posture=Posture.Reactive,
            after={_event("Running"), _event("Retrying")},
            expect={_event("Crashed")},
            within=LONGEST_RUN,
        ),
        _change(StateType.CRASHED, "Crashed; will be started again.", AWAITING_RESTART, force=True),
    )


def _restart(seconds: int) -> AutomationCore:
    return _automation(
        RESTART,
        EventTrigger(
            **_of_one_run(),
            posture=Posture.Proactive,
            after={_event(AWAITING_RESTART)},
            expect=set(map(_event, "Scheduled AwaitingRetry Pending Running Cancelled Completed Failed".split())),
            within=timedelta(seconds=seconds),
        ),
        _change(StateType.SCHEDULED, "Crashed; started again.", "AwaitingRetry"),
    )


def _change(state: StateType, message: str, name: str | None = None, force: bool = False) -> ChangeFlowRunState:
    return ChangeFlowRunState(state=state, name=name, message=message, force=force)


def _automation(name: str, trigger: EventTrigger, action: ChangeFlowRunState) -> AutomationCore:
    return AutomationCore(
        name=name, description="Made by sft-flows (tasks.automations).", trigger=trigger, actions=[action]
    )


def _of_one_run() -> dict[str, Any]:
    return {
        "match": {"prefect.resource.id": "prefect.flow-run.*"},
        "match_related": [{"prefect.resource.id": f"prefect.tag.{TAG}", "prefect.resource.role": "tag"}],
        "for_each": {"prefect.resource.id"},
        "threshold": 1,
    }


def _event(state: str) -> str:
    return f"prefect.flow-run.{state}"


if __name__ == "__main__":
    for made in register_automations(heartbeat_frequency()):
        say(made)
