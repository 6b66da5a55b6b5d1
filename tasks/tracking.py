"""MLflow runs: one parent a retraining, one child a part, found again by fingerprint (DESIGN 7).

Every step's manifest is recorded here, so that the ancestry of a model can be walked in MLflow alone. Nothing here
decides anything: if it says nothing new, MLflow holds what it held. A server that is away is waited for
(`tasks/patience.py`), but never by training.
"""

import json
import logging
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from threading import Event, Thread
from typing import Any, cast

import mlflow
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS, ErrorCode
from mlflow.tracking import MlflowClient

from sft_core.plan import Plan
from sft_core.recipe import Recipe
from sft_core.steps import Built
from sft_core.train.metrics import read_metrics
from tasks.mlflow_database import migrate_current
from tasks.patience import PatientClient, first_line, new_client, patiently

RETRAINING, PART = "sft.retraining", "sft.part"
MAX_PARAM_LENGTH = 500
METRICS_A_BATCH = 1000
FOLLOW_SECONDS = 5.0
"""Between two sendings of new training metrics."""
TRAINING_METRICS = (
    *("loss", "eval_loss", "learning_rate", "grad_norm", "epoch"),
    *("tokens", "supervised_tokens", "tokens_per_second"),
)


@cache
def client() -> MlflowClient:
    """Of the server or database that `MLFLOW_TRACKING_URI` names (`mlflow.db` in the current directory by default).

    Waits for a server that is away; TrackingError when it stays away.
    """
    return cast(MlflowClient, PatientClient(new_client()))


@dataclass(frozen=True, slots=True)
class PartRun:
    """The MLflow run of one part (prepare, train or publish) of one retraining."""

    run_id: str
    parent_run_id: str

    def record(self, key: str, built: Built) -> None:
        """The step's manifest as an MLflow artifact, its figures as metrics `step/name`."""
        manifest = built.manifest
        client().log_dict(self.run_id, manifest.as_dict(), f"manifests/{key.replace('/', '-')}.json")
        client().set_tag(self.run_id, f"sft.{key.replace('/', '.')}", manifest.fingerprint)
        figures = {**manifest.facts, **manifest.facts.get("metrics", {}), "took_seconds": manifest.took_seconds}
        for unit, entry in manifest.ledger.items():
            figures |= {f"{unit}_in": entry["in"], f"{unit}_out": entry["out"]}
        numbers = {k: float(v) for k, v in figures.items() if isinstance(v, int | float) and not isinstance(v, bool)}
        stamp = int(datetime.fromisoformat(manifest.started).timestamp() * 1000)  # a second recording adds no point
        self._log(client(), [Metric(f"{key}/{name}", value, stamp, 0) for name, value in numbers.items()])

    def record_training(self, metrics_file: Path, skip: int = 0, to: MlflowClient | None = None) -> int:
        """Lines of `metrics.jsonl` after the first `skip`; gives how many there are. A line sent twice adds nothing."""
        entries = read_metrics(metrics_file)
        self._log(
            to or client(),
            [
                Metric(f"train/{name}", entry[name], entry["time"], entry["optimizer_step"])
                for entry in entries[skip:]
                for name in TRAINING_METRICS
                if name in entry
            ],
        )
        return len(entries)

    @contextmanager
    def following(self, metrics_file: Callable[[], Path]) -> Iterator[None]:
        """Send lines as training writes them, from a thread: a slow or dead server never holds training up. It may be
        another file each time.

        What it could not send is sent at the end by `record_training`.
        """
        stop = Event()

        def follow() -> None:
            sent, impatient, away = 0, new_client(), False
            while not stop.wait(FOLLOW_SECONDS):
                try:
                    sent = self.record_training(metrics_file(), sent, impatient)
                    away = False
                except MlflowException as error:
                    if not away:  # once an outage
                        logging.getLogger(__name__).warning("metrics are sent later: %s", first_line(error))
                    away = True

        follower = Thread(target=follow, daemon=True)
        follower.start()
        try:
            yield
        finally:
            stop.set()
            follower.join(FOLLOW_SECONDS)

    def _log(self, to: MlflowClient, metrics: list[Metric]) -> None:
        for start in range(0, len(metrics), METRICS_A_BATCH):
            to.log_batch(self.run_id, metrics=metrics[start : start + METRICS_A_BATCH])


@contextmanager
def part_run(part: str, recipe: Recipe, plan: Plan) -> Iterator[PartRun]:
    """The part's run, running inside the block; afterwards FINISHED, FAILED or (cancelled, killed) KILLED.

    Where the block failed and MLflow is away, its error goes on and the runs stay RUNNING until the next try ends them.
    """
    parent_id = _run_id(recipe, plan, None)
    run_id = _run_id(recipe, plan, part)
    status = "KILLED"
    try:
        client().update_run(parent_id, status="RUNNING")
        client().update_run(run_id, status="RUNNING")
        yield PartRun(run_id, parent_id)
        status = "FINISHED"
    except Exception:  # raised again: only the run's status is decided here
        status = "FAILED"
        raise
    finally:
        _end([run_id, parent_id], status)


def _end(run_ids: list[str], status: str) -> None:
    """Waits for MLflow only where the work went well: an error, or a cancellation, must not wait."""
    to = client() if status == "FINISHED" else new_client()
    try:
        for run_id in run_ids:
            to.set_terminated(run_id, status)
    except MlflowException as error:
        if status == "FINISHED":
            raise
        logging.getLogger(__name__).warning("left RUNNING in MLflow: %s", first_line(error))


def find_run(recipe: Recipe, plan: Plan, part: str | None) -> str | None:
    """Run id of the retraining (or of one part of it), by fingerprint."""
    experiment = client().get_experiment_by_name(recipe.name)
    if experiment is None:
        return None
    wanted = f"tags.`{RETRAINING}` = '{plan.fingerprint}' and tags.`{PART}` = '{part or 'retraining'}'"
    oldest_first = ["attributes.start_time ASC"]
    runs = client().search_runs([experiment.experiment_id], wanted, max_results=1, order_by=oldest_first)
    return str(runs[0].info.run_id) if runs else None


def _run_id(recipe: Recipe, plan: Plan, part: str | None) -> str:
    found = find_run(recipe, plan, part)
    if found is not None:
        return found
    experiment_id = _experiment_id(recipe.name)
    tags = {RETRAINING: plan.fingerprint, PART: part or "retraining"}
    parent_id = find_run(recipe, plan, None)
    if part is not None and parent_id is not None:
        tags["mlflow.parentRunId"] = parent_id
    run = client().create_run(experiment_id, tags=tags, run_name=f"{part or recipe.name}-{plan.fingerprint[:8]}")
    run_id = str(run.info.run_id)
    first = find_run(recipe, plan, part) or run_id
    if first != run_id:  # another process was quicker, or the answer to our first try was lost
        client().delete_run(run_id)
    if part is None:
        _record_recipe(first, recipe, plan)
    return first


def _experiment_id(name: str) -> str:
    experiment = client().get_experiment_by_name(name)
    if experiment is not None:
        return str(experiment.experiment_id)
    try:
        return str(client().create_experiment(name, artifact_location=_artifact_folder(name)))
    except MlflowException as error:
        if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):
            raise
    return str(client().get_experiment_by_name(name).experiment_id)  # another process made it in between


def _artifact_folder(name: str) -> str | None:
    """Beside the database where MLflow is a local SQLite file, wherever one starts from; else the server's own."""
    uri = mlflow.get_tracking_uri()
    if not uri.startswith("sqlite:///"):
        return None
    return (Path(uri.removeprefix("sqlite:///")).resolve().parent / "mlartifacts" / name).as_uri()


def _record_recipe(run_id: str, recipe: Recipe, plan: Plan) -> None:
    values = recipe.as_dict()
    client().log_dict(run_id, values, "recipe.json")
    client().log_dict(run_id, plan.as_dict(), "plan.json")
    params = [Param(key, text[:MAX_PARAM_LENGTH]) for key, text in flatten(values).items()]
    tags = [RunTag("sft.recipe", recipe.name), RunTag("sft.commit", code_version())]
    client().log_batch(run_id, params=params, tags=[tag for tag in tags if tag.value])


def code_version() -> str:
    """The project's commit: GIT_SHA, else what git says of its folder (`+` after it: with changes); may be empty."""
    if "GIT_SHA" in os.environ:
        return os.environ["GIT_SHA"]
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changes = subprocess.run(
            [*git, "status", "--porcelain", "--", ".."], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return f"{head}+" if changes.stdout else head


def flatten(value: Any, key: str = "") -> dict[str, str]:
    """Nested values to dotted keys.

    >>> flatten({"train": {"lora": {"r": 8}}, "datasets": [{"path": "a"}]})
    {'train.lora.r': '8', 'datasets.0.path': 'a'}
    """
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)  # type: ignore[assignment]
    else:
        return {key: value if isinstance(value, str) else json.dumps(value)}
    return {k: v for name, inner in items for k, v in flatten(inner, f"{key}.{name}" if key else str(name)).items()}


def download_model(uri: str) -> Path:
    """Local folder of a registered model's HF files, from `models:/NAME@ALIAS` or `models:/NAME/VERSION`."""
    migrate_current()
    folder = Path(patiently(mlflow.artifacts.download_artifacts, uri))
    model = folder / "model"
    return model if model.is_dir() else folder
