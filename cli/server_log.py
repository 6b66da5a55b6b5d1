"""Errors that a Prefect server writes to its log about its own services: scheduler, late runs, automations.

Its pages show none of them. In: the server's log file, read as it grows. Out: `ServiceError`s, one for each service.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

HEADER = re.compile(r"^\d\d:\d\d:\d\d\.\d+ \| (?P<level>\w+) +\| (?P<logger>\S+) - (?P<text>.*)$")
"""How Prefect's server begins each record: time, level, logger, message."""
LEVELS = ("ERROR", "CRITICAL")
SERVICES = ("docket", "prefect.server")
"""Loggers of the server's own work. `docket` runs its services."""
EXCEPTION = re.compile(r"^[A-Za-z_][\w.]*(Error|Exception|Exit|Interrupt|Warning)\b")
"""The last line of a traceback."""
SERVICE_NAME = re.compile(r"(\w+)\(\)")
"""docket names the service as a call: `schedule_deployments(){schedule_deployments}`."""


@dataclass(frozen=True, slots=True)
class ServiceError:
    """The first error of one service."""

    service: str
    text: str


@dataclass(slots=True)
class ServerLog:
    """A log that is read as it grows; `look` gives what is new."""

    file: Path
    _offset: int = 0
    _rest: str = ""
    _open: tuple[str, str] | None = None
    _seen: set[str] = field(default_factory=set)

    def look(self) -> list[ServiceError]:
        """The first error of each service that had none at the last look."""
        if not self.file.is_file():
            return []
        with self.file.open("rb") as log:
            log.seek(self._offset)
            new = log.read()
        self._offset += len(new)
        *lines, self._rest = (self._rest + new.decode("utf-8", "replace")).split("\n")
        found = []
        for line in lines:
            if (error := self._read(line)) is not None and error.service not in self._seen:
                self._seen.add(error.service)
                found.append(error)
        return found

    def skip(self) -> None:
        """What is there now is of an earlier server."""
        self._offset = self.file.stat().st_size if self.file.is_file() else 0

    def _read(self, line: str) -> ServiceError | None:
        """An error is told by its header, in words by the last line of the traceback under it."""
        header = HEADER.match(line)
        if header is not None:
            ended, self._open = self._end(), None
            if header["level"] in LEVELS and header["logger"].startswith(SERVICES):
                name = SERVICE_NAME.search(header["text"])
                self._open = (name[1] if name else header["logger"], header["text"])
            return ended
        if self._open is not None and EXCEPTION.match(line):
            self._open = (self._open[0], line)
            return self._end()
        return None

    def _end(self) -> ServiceError | None:
        if self._open is None:
            return None
        service, text = self._open
        self._open = None
        return ServiceError(service, text.strip())
