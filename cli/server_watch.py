"""What `sft up` looks after while Prefect's server runs: what its pages do not show, and what it may forget.

In: the server's log, and the server. Out: warnings for the terminal, each said once.
"""

import contextlib
import time
from datetime import UTC, datetime

from cli.server_log import ServerLog

LOOK_SECONDS = 60.0
"""Between two looks at schedules and crashed runs. A schedule without a run in two of them in a row is reported."""
Schedule = tuple[str, str]
"""Deployment, and the schedule in words."""


class ServerWatch:
    """Errors of the server's services, schedules that lost their next run, restarts that were forgotten."""

    def __init__(self, log: ServerLog) -> None:
        self._log = log
        self._began = datetime.now(UTC)
        self._looked = time.monotonic()
        self._missing: set[Schedule] = set()
        self._reported: set[Schedule] = set()

    def look(self) -> list[str]:
        """What is new since the last look. Restarts are done, and said."""
        found = [
            f"Prefect's server reports an error of its service {error.service}: {error.text} ({self._log.file})"
            for error in self._log.look()
        ]
        if time.monotonic() - self._looked < LOOK_SECONDS:
            return found
        import httpx
        from prefect.exceptions import PrefectException

        from tasks.automations import restart_forgotten

        self._looked = time.monotonic()
        # Busy, or something was deleted meanwhile: the next look. A server that has ended is noticed elsewhere.
        with contextlib.suppress(httpx.HTTPError, PrefectException, OSError):
            found += [f"{name} had crashed and is started again" for name in restart_forgotten(self._began)]
            found += self._lost_schedules()
        return found

    def _lost_schedules(self) -> list[str]:
        from tasks.upcoming import read_next_runs

        missing = {(run.deployment, run.schedule): run for run in read_next_runs() if run.missing}
        found = (self._missing & missing.keys()) - self._reported
        self._missing = set(missing)
        self._reported = (self._reported | found) & missing.keys()
        return [
            f"{missing[key].words}: the schedule is on and will not fire; see {self._log.file}" for key in sorted(found)
        ]
