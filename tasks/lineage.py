"""What MLflow recorded of a version's retraining: recipe, plan and every step's manifest; no store is read.

In: a registered version. Out: `Recorded`. RegistryError where the run, or a part of what it held, is gone.
"""

import mlflow
from mlflow.exceptions import MlflowException

from sft_core.artifacts import Manifest
from sft_core.errors import RegistryError
from sft_core.lineage import Recorded, RowUse, find_row, trained_row_ids
from sft_core.store import Store
from tasks.registry import RUN, RegisteredVersion, read_versions
from tasks.tracking import client

RECIPE, PLAN, MANIFESTS = "recipe.json", "plan.json", "manifests"


def read_recorded(model_name: str, version: RegisteredVersion) -> Recorded:
    """Everything that the parent run and its parts hold."""
    parent_id = version.tags.get(RUN, "")
    try:
        parent = client().get_run(parent_id)
    except MlflowException as error:
        raise RegistryError(
            f"{model_name} version {version.number}: its MLflow run {parent_id!r} is gone: {error.message}"
        ) from None
    recipe, plan = (_load(parent_id, name) for name in (RECIPE, PLAN))
    parts = client().search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent_id}'")
    manifests = {}
    for part in sorted(parts, key=lambda run: run.info.start_time):
        for file in client().list_artifacts(part.info.run_id, MANIFESTS):
            key = file.path.removeprefix(f"{MANIFESTS}/").removesuffix(".json")
            step, dash, rest = key.partition("-")
            manifests[f"{step}/{rest}" if dash else step] = Manifest.from_dict(_load(part.info.run_id, file.path))
    return Recorded(recipe, plan, manifests, parent.data.tags.get("sft.commit", ""))


def read_trained_rows(recorded: Recorded) -> list[str] | None:
    """row_ids that a retraining was trained on; None where its store has them no more."""
    rows = trained_row_ids(Store(recorded.recipe["store"]), recorded.plan["steps"]["pack"]["fingerprint"])
    return list(rows) if rows is not None else None


def find_row_uses(model_name: str, row: str) -> list[tuple[RegisteredVersion, RowUse]]:
    """For every version, what its retraining did with the row (a row_id, or a JSON row's text)."""
    found = []
    for version in read_versions(model_name):
        recorded = read_recorded(model_name, version)
        found += [(version, use) for use in find_row(recorded, Store(recorded.recipe["store"]), row)]
    return found


def _load(run_id: str, path: str) -> dict[str, object]:
    try:
        loaded: dict[str, object] = mlflow.artifacts.load_dict(f"runs:/{run_id}/{path}")
    except MlflowException as error:
        raise RegistryError(f"MLflow run {run_id}: {path} cannot be read: {error.message}") from None
    return loaded
