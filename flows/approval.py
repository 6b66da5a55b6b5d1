"""Ask a person whether a version that passed the gate becomes champion, and do as they say.

The run is suspended while it waits: it holds no process. When somebody answers, a worker starts the flow again from its
top; the answer is then there. In: model and version. Out: a final state named after what became of the request.
"""

from typing import Literal

from prefect import get_run_logger
from prefect.artifacts import create_markdown_artifact
from prefect.context import FlowRunContext
from prefect.flow_runs import suspend_flow_run
from prefect.input import RunInput, read_flow_run_input
from prefect.states import Completed, Failed, State
from pydantic import Field

from sft_core.errors import RegistryError
from tasks.approval import Approval, claim, refuse_request
from tasks.approval_runs import drop_deadline, end_run, is_open, schedule_deadline
from tasks.models import NotPromotable, promote, reject
from tasks.registry import JUDGED_AGAINST, read_verdict_table

KEY = "approval"
RESPONSE = f"suspended-{KEY}-response"
"""Where Prefect keeps the answer to a suspension with that key."""
SPARE_SECONDS = 3600
"""After the deadline its own run has this long before the server fails the one that waits."""


class Answer(RunInput):
    """What a person is asked."""

    decision: Literal["approve", "reject"] = Field(title="Decision", description="A rejected version is barred.")
    who: str = Field(title="Your name", min_length=1, description="Kept in the registry.")
    reason: str = Field(title="Why", min_length=1, description="Kept in the registry.")


def ask_and_settle(model_name: str, wanted: str) -> State:
    """The whole of `promote` without a reason."""
    context = FlowRunContext.get()
    if context is None or context.flow_run is None or context.flow_run.deployment_id is None:
        raise RegistryError("give a reason: only a deployment (promote/on-approval) can wait for an answer")
    run_id = str(context.flow_run.id)
    version, approval = claim(model_name, wanted, run_id, is_open)
    if not approval.waiting:
        return _over(model_name, version.number, run_id, approval)
    if approval.asked_by != run_id:
        return Completed(name="Asked", message=f"flow run {approval.asked_by} asks already: answer there")
    given = read_flow_run_input(RESPONSE)
    if given is not None:
        return _settle(model_name, version.number, run_id, Answer(**given))
    asked = f"{model_name} version {version.number}, judged against champion {version.tags[JUDGED_AGAINST]}"
    until = f"Without an answer until {approval.until:%Y-%m-%d %H:%M} UTC the champion stays"
    text = f"{asked}. {until}.\n\n{read_verdict_table(version)}"
    create_markdown_artifact(text, key=KEY, description=f"{model_name} version {version.number} waits for approval")
    schedule_deadline({"model_name": model_name, "version": version.number}, run_id, approval)
    form = Answer.with_initial_data(description=text)
    suspend_flow_run(wait_for_input=form, key=KEY, timeout=approval.seconds_left + SPARE_SECONDS)
    raise AssertionError("a suspended flow starts again from its top")


def _settle(model_name: str, number: str, run_id: str, answer: Answer) -> State:
    """Do as the answer says. Where the registry stands against it, the request ends as refused."""
    by = f"{answer.who} in flow run {run_id}"
    try:
        if answer.decision == "reject":
            reject(model_name, number, answer.reason, by=by)
            state = Completed(name="Rejected", message=f"{model_name} version {number} is barred: {answer.reason}")
        else:
            moved = promote(model_name, number, answer.reason, by=by)
            state = Completed(
                name="Approved", message=f"{model_name}: champion {moved.before or 'none'} -> {moved.after}"
            )
    except NotPromotable as error:
        refuse_request(model_name, number, str(error))
        state = Failed(name="Refused", message=str(error))
    drop_deadline(run_id)
    get_run_logger().info("%s: %s", state.name, state.message)
    return state


def _over(model_name: str, number: str, run_id: str, approval: Approval) -> State:
    """Nothing is left to ask; whoever still waits for an answer waits no more."""
    message = f"{model_name} version {number}: {approval.outcome}"
    name = approval.state.capitalize()
    if approval.asked_by != run_id:
        end_run(approval.asked_by, name, message)
    return Completed(name=name, message=message)
