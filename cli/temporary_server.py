"""The Prefect server of one `sft run`, where none is configured.

In: Prefect's settings. Out: a server on a port of loopback that this process' Prefect talks to. It has a session of its
own, so Ctrl-C in the terminal does not reach it: the run needs it to say how it ended. It dies with this process.

Prefect would start one itself (`prefect.server.api.server.SubprocessASGIServer`), in the terminal's process group, and
import the whole server here to do so. This one starts while the flows are being imported.
"""

import atexit
import contextlib
import http
import http.client
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import IO

from cli.servers import HOST, ServerError
from sft_core.children import die_with_parent

LOOK_SECONDS = 0.1
END_SECONDS = 3.0
"""How long it may take to write its last events down; then it is killed."""
SETTINGS = {
    "PREFECT_UI_ENABLED": "0",  # these three as SubprocessASGIServer has them
    "PREFECT__SERVER_EPHEMERAL": "1",
    "PREFECT__SERVER_FINAL": "1",
}
LAST_LINES = 15


class TemporaryServer:
    """Started on making, perhaps not yet ready. `patience`: seconds it may take to be."""

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._said: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the server
        with socket.create_server((HOST, 0)) as listening:  # the server inherits it: nobody can take the port meanwhile
            self._port = listening.getsockname()[1]
            self._process = subprocess.Popen(
                [sys.executable, "-m", "sft_cli.module", __name__, str(os.getpid()), str(listening.fileno())],
                env={**os.environ, **SETTINGS},
                pass_fds=[listening.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._said,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def url(self) -> str:
        """Of its API."""
        return f"http://{HOST}:{self._port}/api"

    def wait_ready(self) -> None:
        """Until it answers. ServerError with the end of what it said if it ends before, or does not in time."""
        deadline = time.monotonic() + self._patience
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise ServerError(
                    f"Prefect's temporary server ended with status {self._process.returncode}:\n{self._last_lines()}"
                )
            if self._answers():
                return
            time.sleep(LOOK_SECONDS)
        raise ServerError(
            f"Prefect's temporary server did not answer in {self._patience:.0f} s "
            f"(PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS):\n{self._last_lines()}"
        )

    def stop(self) -> None:
        """End it."""
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_SECONDS)
        self._process.kill()
        self._process.wait()

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection(HOST, self._port, timeout=1)  # knows of no proxy
        with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
            connection.request("GET", "/api/health")
            return connection.getresponse().status == http.HTTPStatus.OK
        return False

    def _last_lines(self) -> str:
        self._said.seek(0)
        return "\n".join(self._said.read().decode("utf-8", "replace").splitlines()[-LAST_LINES:])


def start_temporary_server() -> Callable[[], None]:
    """Start one and have this process' Prefect use it, until this process ends. Gives what waits until it is ready.
    Nothing is started where a server is configured, or where Prefect was told to use no temporary one. To be called
    before anything talks to Prefect."""
    from prefect.context import refresh_global_settings_context
    from prefect.settings import get_current_settings

    settings = get_current_settings()
    if settings.api.url or not settings.server.ephemeral.enabled:
        return lambda: None
    settings.home.mkdir(parents=True, exist_ok=True)  # Prefect's server makes the folder, not its parents
    server = TemporaryServer(settings.server.ephemeral.startup_timeout_seconds)
    atexit.register(server.stop)  # Prefect's threads have sent what they have by then (threading._register_atexit)
    before = dict(os.environ)
    os.environ |= {"PREFECT_API_URL": server.url, "PREFECT_UI_URL": ""}  # it has no pages to point to
    refresh_global_settings_context()
    os.environ.clear()  # read; what is started from here on needs no server
    os.environ.update(before)
    return server.wait_ready


def _serve(parent: int, descriptor: int) -> None:
    die_with_parent(parent)
    import uvicorn

    config = uvicorn.Config(
        "prefect.server.api.server:create_app",
        factory=True,
        log_level="error",
        lifespan="on",
        timeout_graceful_shutdown=1,
    )
    uvicorn.Server(config).run(sockets=[socket.socket(fileno=descriptor)])


if __name__ == "__main__":
    _serve(int(sys.argv[1]), int(sys.argv[2]))
