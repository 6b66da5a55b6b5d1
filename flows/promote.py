"""promote and rollback: which version consumers load, changed by a person, with a reason.

`promote` without a reason asks for one: it shows the gate's table, ends its process, and goes on when somebody answers.
"""

from typing import Annotated, Any

from prefect import flow
from pydantic import Field

from flows.approval import ask_and_settle
from tasks.models import promote as promote_version
from tasks.models import rollback as roll_back

ModelName = Annotated[str, Field(title="Model", min_length=1, description="Name in the registry.")]


@flow(name="promote", flow_run_name="promote-{model_name}-{version}")
def promote(
    model_name: ModelName,
    version: Annotated[str, Field(title="Version", description="Number or alias, such as candidate.")],
    reason: Annotated[
        str | None,
        Field(
            title="Reason",
            description="Why; kept in the registry. With a reason the version is promoted at once. Empty: this run "
            "shows the gate's table and waits for an answer (register.approval: manual).",
        ),
    ] = None,
    override_gate: Annotated[
        bool, Field(title="Override the gate", description="Promote what the gate did not. Needs a reason.")
    ] = False,
) -> Any:
    """Make a version the champion, after loading it: at once where a reason is given, else when a person approves.

    A version that was rolled back or rejected is refused, and one that was judged against another champion too.
    """
    if not reason:
        return ask_and_settle(model_name, version)
    moved = promote_version(model_name, version, reason, override_gate=override_gate)
    return {"before": moved.before, "after": moved.after}


@flow(name="rollback", flow_run_name="rollback-{model_name}")
def rollback(
    model_name: ModelName,
    reason: Annotated[str, Field(title="Reason", min_length=1, description="Why; kept in the registry.")],
    to: Annotated[
        str | None,
        Field(title="Back to version", description="Number or alias; the previous champion if empty."),
    ] = None,
) -> dict[str, Any]:
    """Give consumers an earlier version again, after loading it, and bar the present champion from coming back."""
    moved = roll_back(model_name, reason, to)
    return {"before": moved.before, "after": moved.after}
