"""Why a flow run that was handed over has not started.

In: the flow run, how long it has been waited for. Out: one line for the parent's log.
"""

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun, WorkerStatus

PATIENCE_SECONDS = 15.0
"""A worker looks for work every 10 s; before that there is nothing to explain."""


def why_waiting(client: SyncPrefectClient, run: FlowRun, waited: float) -> str:
    """`Running` or what its state is; for one that no worker took: why, and what to do."""
    assert run.state is not None, "the server gives every flow run a state"
    if not run.state.is_scheduled() or waited < PATIENCE_SECONDS or run.work_pool_name is None:
        return str(run.state.name)
    pool = client.read_work_pool(run.work_pool_name)
    workers = client.read_workers_for_work_pool(pool.name)
    if pool.is_paused:
        return f"waits: the work pool {pool.name!r} is paused; resume it: prefect work-pool resume {pool.name}"
    if not any(worker.status == WorkerStatus.ONLINE for worker in workers):
        return (
            f"waits: no worker of the work pool {pool.name!r} is online; start one on a machine of that pool: "
            f"prefect worker start --pool {pool.name}"
        )
    return f"waits for a free place in the work pool {pool.name!r} (limit {pool.concurrency_limit or 'of its workers'})"
