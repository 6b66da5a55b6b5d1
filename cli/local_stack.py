"""A local stack: where things are, and what its Prefect server needs: pools, limits, automations, deployments.

In: a Prefect server named by PREFECT_API_URL in this process' environment, the user's folder. Out: what is registered
there. Nothing that the user changed in the UI is put back: pools that exist stay as they are, and deployments are
registered again only when prefect.yaml or the code of the flows changed.
"""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

from cli.server_log import ServerLog
from cli.servers import MARK, Process, ServerError, last_lines, start

POOLS: Mapping[str, int | None] = {"cpu": None, "gpu": 1}
"""Pools and how many runs each takes at a time. `cpu` has no limit: a waiting parent and its part are both in it."""
FORM = "retrain/on-demand"
DEPLOY_SECONDS = 600.0
"""Bound on `prefect deploy`; 10 s on an idle machine."""

SETTINGS = {
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "60",  # a run whose host died is found after three of them
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
    "PREFECT_WORKER_QUERY_SECONDS": "5",
}
"""Settings of the stack's processes where the user's environment has none; docs/operations.md says what they do."""


@dataclass
class Stack:
    """Where things are and listen, and what was started."""

    project: Path
    host: str
    prefect_port: int
    mlflow_port: int
    servers: list[Process] = field(default_factory=list)
    server_log: ServerLog = field(init=False)
    workers: list[Process] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Where `cli.servers.start` has Prefect's server write."""
        self.server_log = ServerLog(self.folder / "logs" / "prefect.log")

    @property
    def folder(self) -> Path:
        """Data and logs."""
        return self.project / ".sft"

    @property
    def prefect_url(self) -> str:
        """Prefect's UI."""
        return f"http://{self.host}:{self.prefect_port}"

    @property
    def mlflow_url(self) -> str:
        """MLflow's UI and API."""
        return f"http://{self.host}:{self.mlflow_port}"

    @property
    def exports(self) -> str:
        """Shell lines for other terminals."""
        return f"export PREFECT_API_URL={self.prefect_url}/api\nexport MLFLOW_TRACKING_URI={self.mlflow_url}\n"

    def environment(self) -> dict[str, str]:
        """Of all processes of the stack."""
        own = {
            "PREFECT_HOME": str(self.folder / "prefect"),
            "PREFECT_API_URL": f"{self.prefect_url}/api",
            "PREFECT_UI_URL": self.prefect_url,
            "MLFLOW_TRACKING_URI": self.mlflow_url,
            "SFT_PROJECT_DIR": str(self.project),
            "COLUMNS": "150",
            MARK: str(self.folder),
        }
        elsewhere = ("PREFECT_API_KEY", "PREFECT_PROFILE", "MLFLOW_REGISTRY_URI", "MLFLOW_RUN_ID")
        return SETTINGS | {k: v for k, v in os.environ.items() if k not in elsewhere} | own


def make_pools() -> None:
    """The work pools, of type process; those that exist stay as they are."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectNotFound
    from prefect.workers.process import ProcessWorker

    template = ProcessWorker.get_default_base_job_template()
    with get_client(sync_client=True) as client:
        for name, limit in POOLS.items():
            try:
                client.read_work_pool(name)
            except ObjectNotFound:
                client.create_work_pool(
                    WorkPoolCreate(name=name, type="process", base_job_template=template, concurrency_limit=limit)
                )


def pause_pools(folder: Path) -> None:
    """Workers take no new runs; which pools that stopped is noted, so that those a person paused stay paused."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolUpdate

    with get_client(sync_client=True) as client:
        open_pools = [name for name in POOLS if not client.read_work_pool(name).is_paused]
        (folder / "paused").write_text("\n".join(open_pools))
        for name in open_pools:
            client.update_work_pool(name, WorkPoolUpdate(is_paused=True))


def resume_pools(folder: Path) -> None:
    """Undo `pause_pools`, if it was called."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolUpdate

    if (folder / "paused").is_file():
        with get_client(sync_client=True) as client:
            for name in (folder / "paused").read_text().split():
                client.update_work_pool(name, WorkPoolUpdate(is_paused=False))
        (folder / "paused").unlink()


def make_automations() -> None:
    """What ends dead runs and starts crashed retrainings again (`tasks.automations`)."""
    from tasks.automations import heartbeat_frequency, register_automations

    register_automations(heartbeat_frequency())


def prefect_file(project: Path) -> Path:
    """The user's own prefect.yaml, else the one that ships."""
    own = project / "prefect.yaml"
    return own if own.is_file() else Path(str(resources.files("flows") / "prefect.yaml"))


def code_hash(file: Path) -> str:
    """SHA-256 of prefect.yaml and of all that decides the form: the flows and the recipe's sections."""
    digest = hashlib.sha256(file.read_bytes())
    for package in ("flows", "sft_core.recipe"):
        for source in sorted(Path(str(resources.files(package))).glob("*.py")):
            digest.update(source.read_bytes())
    return digest.hexdigest()


def deploy_command(file: Path) -> list[str]:
    """`python -m` this registers all deployments of `file`."""
    return ["prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(file)]


def deploy_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """For `deploy_command`: without SFT_PROJECT_DIR, which each worker is to read from its own environment, and with
    our packages before those of the current folder."""
    return {**{k: v for k, v in environment.items() if k != "SFT_PROJECT_DIR"}, "PYTHONSAFEPATH": "1"}


def start_deploy(project: Path, folder: Path, environment: Mapping[str, str]) -> Process | None:
    """Begin `prefect deploy --all`, whose code wants seconds to import. None if what is registered is of this code."""
    file = prefect_file(project)
    if _registered(folder).is_file() and _registered(folder).read_text() == code_hash(file) and form_id() is not None:
        return None
    # In the user's folder: entrypoints of a user's own flows are relative to it.
    return start("deploy", deploy_command(file), folder, deploy_environment(environment), where=project)


def finish_deploy(deploy: Process, project: Path, folder: Path) -> None:
    """Wait for it. ServerError with the end of its log where it failed."""
    status = deploy.popen.wait(DEPLOY_SECONDS)
    if status or form_id() is None:
        raise ServerError(f"registering {prefect_file(project)} failed, status {status}:\n{last_lines(deploy.log, 30)}")
    _registered(folder).write_text(code_hash(prefect_file(project)))


def form_id() -> str | None:
    """Id of the deployment whose form starts a retraining; None if it is not registered."""
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    with get_client(sync_client=True) as client:
        try:
            return str(client.read_deployment_by_name(FORM).id)
        except ObjectNotFound:
            return None


def _registered(folder: Path) -> Path:
    return folder / "registered"
