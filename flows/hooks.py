"""What happens after a flow run was cancelled or has crashed. Prefect calls these by keyword, in another process.

In: the flow, its flow run, the state. Out: parts cancelled, MLflow runs ended.
"""

from typing import Any

from prefect.client.schemas.objects import FlowRun, State
from prefect.flows import Flow

from flows.handover import cancel_parts
from sft_core.plan import Plan
from sft_core.recipe import resolve
from tasks.automations import starts_again
from tasks.ended_runs import end_run


def cancel_children(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """on_cancellation, on_crashed of the parent. A crashed one that is started again finds its parts at work."""
    if state.is_crashed() and starts_again(flow_run.id):
        return
    cancel_parts(flow_run.id)


def end_mlflow_run(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """on_cancellation, on_crashed of a part. After a crash a parent does it, before the next attempt begins."""
    if state.is_crashed() and flow_run.parent_task_run_id:
        return
    plan = flow_run.parameters.get("plan")
    if plan is not None:  # else started by hand: its process made the plan, and has ended its run unless it was killed
        end_run(flow.name, resolve(flow_run.parameters["recipe"]), Plan.from_dict(plan))
