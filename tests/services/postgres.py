"""A PostgreSQL of the test's own, from Debian's package: its data in a temporary folder, its port on loopback."""

import os
import pwd
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp

import pytest

from cli.servers import HOST, free_port

USER = "postgres"
START_SECONDS = 120
STOP_SECONDS = 60
COMMAND_SECONDS = 120


@dataclass(frozen=True, slots=True)
class Postgres:
    """A running server: where its programs are, its port."""

    programs: Path
    port: int

    def url(self, database: str, driver: str = "postgresql+psycopg2") -> str:
        """SQLAlchemy's name of a database; anyone on this machine may connect to this server."""
        return f"{driver}://{USER}@{HOST}:{self.port}/{database}"

    def run(self, program: str, *arguments: str) -> str:
        """A client program (`psql`, `createdb`, `pg_dump`); what it printed."""
        address = ["--host", HOST, "--port", str(self.port), "--username", USER]
        command = [str(self.programs / program), *address, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_SECONDS)
        assert done.returncode == 0, f"{program} {arguments}: {done.stderr[-2000:]}"
        return done.stdout

    def ask(self, database: str, query: str) -> list[str]:
        """Rows of an SQL query, columns parted by `|`."""
        return self.run("psql", "--dbname", database, "--no-align", "--tuples-only", "--command", query).splitlines()


@contextmanager
def postgres(*databases: str) -> Iterator[Postgres]:
    """A server with empty `databases`; it ends with the block. Skips the test where Debian's `postgresql` is absent."""
    programs = _programs()
    folder = Path(mkdtemp(prefix="sft-postgres-"))  # pytest's own folders are closed to other users
    try:
        if os.getuid() == 0:  # initdb refuses to run as root
            os.chown(folder, pwd.getpwnam(USER).pw_uid, pwd.getpwnam(USER).pw_gid)
        data = folder / "data"
        options = ["--username", USER, "--auth", "trust", "--encoding", "UTF8", "--no-locale", "--no-sync"]
        _as_user([str(programs / "initdb"), "--pgdata", str(data), *options], folder)
        server = Postgres(programs, free_port())
        with _running(server, data, folder):
            for database in databases:
                server.run("createdb", database)
            yield server
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _running(server: Postgres, data: Path, folder: Path) -> Iterator[None]:
    control = [str(server.programs / "pg_ctl"), "--pgdata", str(data), "--wait"]
    settings = f"-h {HOST} -p {server.port} -k {folder} -c max_connections=200 -c fsync=off"
    log = ["--log", str(folder / "log"), "--timeout", str(START_SECONDS)]
    _as_user([*control, *log, "--options", settings, "start"], folder)
    try:
        yield
    finally:
        _as_user([*control, "--mode", "fast", "--timeout", str(STOP_SECONDS), "stop"], folder)


def _as_user(command: list[str], folder: Path) -> None:
    user = ["runuser", "--user", USER, "--"] if os.getuid() == 0 else []
    done = subprocess.run(
        [*user, *command], cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True, timeout=START_SECONDS + STOP_SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}: {done.stderr[-2000:]}"


def _programs() -> Path:
    """The newest version's folder of programs. The client library for MLflow must be there too."""
    pytest.importorskip("psycopg2", reason="pip install 'sft-flows[postgres]'")
    found = [path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/initdb")]
    if not found:
        pytest.skip("no PostgreSQL: apt-get install postgresql")
    return max(found, key=lambda folder: int(folder.parent.name))
