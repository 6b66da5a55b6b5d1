"""One stack for all tests of a file: servers, workers of both pools, the project's deployments."""

import signal
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.services.prepared import begin_with, prepared
from tests.services.stack import Stack, write_project

__all__ = ["prepared"]

SERVICES_SECONDS = 1500
"""Bound on one test here: a flow run on a busy machine takes minutes."""

signal.signal(signal.SIGINT, signal.default_int_handler)
# A shell's background command has it ignored, and so has all that it starts: a Prefect worker then never ends.


LONGEST = (
    "test_wheel.py",
    "test_kills.py",
    "test_terminal.py",
    "test_postgres.py",
    "test_outages.py",
    "test_handover.py",
)
"""Files that begin first, longest first, so that no process has only one of them left."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here is slow and has its own bound."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.timeout(SERVICES_SECONDS))
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failure shows what the servers saw: a run that hangs says nothing by itself."""
    report = yield
    if report.when == "call" and report.failed:
        for name, value in getattr(item, "funcargs", {}).items():
            if isinstance(value, Stack):
                report.sections.append((f"servers of {name}", value.story()))
    return report


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, prepared: Path) -> Iterator[Stack]:  # noqa: F811
    """Servers with pools and all deployments, without workers; the folder holds a project (`recipe.yaml`)."""
    stack = begin_with(Stack(write_project(tmp_path_factory.mktemp("stack"), tiny_model)), prepared)
    try:
        yield stack.start()
    finally:
        stack.stop()


@pytest.fixture(scope="module")
def stack(servers: Stack) -> Stack:
    """Servers, a worker each of `cpu` and `gpu`, all deployments."""
    servers.worker("cpu")
    servers.worker("gpu", limit=1)
    return servers
