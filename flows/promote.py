"""promote and rollback: which version consumers load, changed by hand, with a reason."""

from typing import Any

from prefect import flow

from tasks.models import promote as promote_version
from tasks.models import rollback as roll_back


@flow(name="promote", flow_run_name="promote-{model_name}-{version}")
def promote(model_name: str, version: str, reason: str, override_gate: bool = False) -> dict[str, Any]:
    """Make a version the champion.

    Args:
        model_name: Name in the registry.
        version: Number or alias.
        reason: Why; kept in the registry.
        override_gate: Promote what the gate did not.
    """
    moved = promote_version(model_name, version, reason, override_gate=override_gate)
    return {"before": moved.before, "after": moved.after}


@flow(name="rollback", flow_run_name="rollback-{model_name}")
def rollback(model_name: str, reason: str, to: str | None = None) -> dict[str, Any]:
    """Give consumers an earlier version again, and bar the present champion from coming back.

    Args:
        model_name: Name in the registry.
        reason: Why; kept in the registry.
        to: Version to go back to; the previous champion by default.
    """
    moved = roll_back(model_name, reason, to)
    return {"before": moved.before, "after": moved.after}
