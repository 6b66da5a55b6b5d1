"""When each active schedule fires next, and which of them never will.

A Prefect server whose scheduler fails shows nothing of it on its pages: the schedule is on, its runs are never made. So
after deploying, and while `sft up` runs, the server is asked for the next run of every active schedule.

In: a Prefect server (PREFECT_API_URL). Out: a `NextRun` for each active schedule. Source: Prefect's scheduler
(prefect/server/services/scheduler.py) looks every minute, and makes the runs of the next hour, at least
three of each schedule.
"""

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    FlowRunFilterExpectedStartTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType, WorkerStatus
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import ObjectNotFound
from prefect.types._datetime import now

PAGE = 200
"""Prefect's limit on one answer."""
HORIZON = timedelta(days=100)
"""The scheduler makes no runs beyond it (PREFECT_SERVER_SERVICES_SCHEDULER_MAX_SCHEDULED_TIME)."""
LOOK_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class NextRun:
    """The next run of one active schedule, or why there is none, and what would keep it from starting."""

    deployment: str
    """`flow/deployment`."""
    schedule: str
    """Such as `cron 0 3 * * * Etc/UTC`."""
    at: datetime | None
    """When the run is due that the server has made; None if it has made none."""
    ends: bool = False
    """The schedule has no date left within HORIZON: no run is missing."""
    obstacle: str | None = None
    """Why the run would not start at that time, as things are now."""

    @property
    def missing(self) -> bool:
        """Whether the server should have made a run and has not."""
        return self.at is None and not self.ends

    @property
    def words(self) -> str:
        """One line for a person."""
        if self.at is not None:
            when = f"next run {self.at.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"
        else:
            when = f"no date within {HORIZON.days} days" if self.ends else "NO RUN IS PLANNED"
        return f"{self.deployment}  {self.schedule}  {when}{f' ({self.obstacle})' if self.obstacle else ''}"


def read_next_runs() -> list[NextRun]:
    """The next run of every active schedule of every deployment that is not paused."""
    with get_client(sync_client=True) as client:
        flows: dict[Any, str] = {}
        found = []
        for deployment in _deployments(client):
            active = [schedule for schedule in deployment.schedules if schedule.active]
            if deployment.paused or not active:
                continue
            if deployment.flow_id not in flows:
                flows[deployment.flow_id] = client.read_flow(deployment.flow_id).name
            name = f"{flows[deployment.flow_id]}/{deployment.name}"
            planned = _planned(client, deployment)
            obstacle = _obstacle(client, deployment)
            for schedule in active:
                at = planned.get(str(schedule.id))
                ends = at is None and _next_date(schedule.schedule) is None
                found.append(NextRun(name, _describe(schedule.schedule), at, ends, obstacle))
    return found


def wait_for_next_runs(seconds: float) -> list[NextRun]:
    """As `read_next_runs`, once no run is missing or `seconds` have passed. The server's scheduler looks every minute,
    and every 5 s at deployments that changed."""
    deadline = time.monotonic() + seconds
    found = read_next_runs()
    while any(run.missing for run in found) and time.monotonic() < deadline:
        time.sleep(LOOK_SECONDS)
        found = read_next_runs()
    return found


def _deployments(client: SyncPrefectClient) -> Iterator[DeploymentResponse]:
    offset = 0
    while page := client.read_deployments(limit=PAGE, offset=offset):
        yield from page
        offset += PAGE


def _planned(client: SyncPrefectClient, deployment: DeploymentResponse) -> dict[str, datetime]:
    """The earliest time from now on for which the server has made a run, by the schedule's id."""
    wanted = FlowRunFilter(
        deployment_id=FlowRunFilterDeploymentId(any_=[deployment.id]),
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED])),
        expected_start_time=FlowRunFilterExpectedStartTime(after_=now("UTC")),  # type: ignore[arg-type]  # pydantic's name for it
    )
    earliest: dict[str, datetime] = {}
    offset = 0
    while page := client.read_flow_runs(
        flow_run_filter=wanted, sort=FlowRunSort.EXPECTED_START_TIME_ASC, limit=PAGE, offset=offset
    ):
        for run in page:
            if (schedule := _made_by(run)) and run.expected_start_time is not None:
                earliest.setdefault(schedule, run.expected_start_time)
        offset += PAGE
    return earliest


def _made_by(run: FlowRun) -> str | None:
    """Id of the schedule that made the run."""
    by = run.created_by
    return str(by.id) if by is not None and by.type == "SCHEDULE" else None


def _obstacle(client: SyncPrefectClient, deployment: DeploymentResponse) -> str | None:
    if deployment.work_pool_name is None:
        return "it has no work pool: nobody would run it"
    try:
        pool = client.read_work_pool(deployment.work_pool_name)
    except ObjectNotFound:
        return f"there is no work pool {deployment.work_pool_name}"
    if pool.is_paused:
        return f"the work pool {pool.name} is paused: prefect work-pool resume {pool.name}"
    if pool.is_push_pool or pool.is_managed_pool:  # these have no workers
        return None
    if not any(worker.status == WorkerStatus.ONLINE for worker in client.read_workers_for_work_pool(pool.name)):
        return f"no worker of the work pool {pool.name} is online: prefect worker start --pool {pool.name}"
    return None


def _next_date(schedule: Any) -> datetime | None:
    """The schedule's next date within HORIZON, reckoned here by the server's own code."""
    from prefect.server.schemas.schedules import CronSchedule, IntervalSchedule, RRuleSchedule  # seconds to import

    kinds: dict[str, Any] = {cls.__name__: cls for cls in (CronSchedule, IntervalSchedule, RRuleSchedule)}
    kind = kinds[type(schedule).__name__]
    start = datetime.now(UTC)
    dates = asyncio.run(kind.model_validate(schedule.model_dump()).get_dates(1, start=start, end=start + HORIZON))
    return dates[0] if dates else None


def _describe(schedule: Any) -> str:
    zone = getattr(schedule, "timezone", None) or "UTC"
    for kind in ("cron", "interval", "rrule"):
        if (value := getattr(schedule, kind, None)) is not None:
            return f"{kind} {' '.join(str(value).split())} {zone}"
    return type(schedule).__name__
