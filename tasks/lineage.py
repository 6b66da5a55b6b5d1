"""What MLflow recorded of a version's retraining: recipe, plan and every step's manifest; no store is read.

In: a registered version. Out: `Recorded`. RegistryError where the run, or a part of what it held, is gone.
"""

from dataclasses import dataclass

import mlflow
from mlflow.exceptions import MlflowException

from sft_core.artifacts import Manifest
from sft_core.errors import DataError, RegistryError
from sft_core.lineage import Recorded, RowUse, is_row_id, row_ids_of, trained_row_ids, use_of_row
from sft_core.store import Store
from tasks.ancestry import ancestors_of
from tasks.registry import RUN, RegisteredVersion, read_versions
from tasks.tracking import client

RECIPE, PLAN, MANIFESTS = "recipe.json", "plan.json", "manifests"
WEIGHT = ("trained", "unknown", "held out", "absent")
"""Uses of a row, what an erasure must know first."""


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
            try:
                manifest = Manifest.from_dict(_load(part.info.run_id, file.path))
            except ValueError as error:
                raise RegistryError(
                    f"{model_name} version {version.number}: {file.path} of its MLflow run {part.info.run_id} is no "
                    f"manifest: {error}"
                ) from None
            manifests[f"{step}/{rest}" if dash else step] = manifest
    return Recorded(recipe, plan, manifests, parent.data.tags.get("sft.commit", ""))


def read_trained_rows(recorded: Recorded) -> list[str] | None:
    """row_ids that a retraining was trained on; None where its store has them no more."""
    rows = trained_row_ids(Store(recorded.recipe["store"]), recorded.plan["steps"]["pack"]["fingerprint"])
    return list(rows) if rows is not None else None


def find_row_uses(model_name: str, row: str) -> list[tuple[RegisteredVersion, RowUse]]:
    """For every version, what it, or a version it is tuned from, did with the row (a row_id, or a JSON row's text).

    `unknown` where what was recorded, or the packed rows, are gone. DataError if no recipe of theirs reads the row.
    """
    lines = [(version, _line(model_name, version)) for version in read_versions(model_name)]
    if not lines:
        return []
    row_ids = _row_ids([one.recorded for _, line in lines for one in line if one.recorded is not None], row)
    return [(version, _use(line, row_id)) for version, line in lines for row_id in row_ids]


@dataclass(frozen=True, slots=True)
class _Relative:
    """A version in a line of descent: `name` is empty for the version itself; `recorded` None where that is gone."""

    name: str
    recorded: Recorded | None

    def use(self, row_id: str) -> RowUse:
        if self.recorded is None:
            return RowUse("unknown", row_id, self.name)
        return RowUse(use_of_row(self.recorded, Store(self.recorded.recipe["store"]), row_id), row_id, self.name)


def _line(model_name: str, version: RegisteredVersion) -> list[_Relative]:
    """The version, then those it is tuned from."""
    line = [("", model_name, version), *((f"{name}/{one.number}", name, one) for name, one in ancestors_of(version))]
    found = []
    for label, name, one in line:
        try:
            found.append(_Relative(label, read_recorded(name, one)))
        except RegistryError:
            found.append(_Relative(label, None))
    return found


def _row_ids(records: list[Recorded], row: str) -> list[str]:
    """What any of the recipes makes of the row: one may name a row that another wrote differently."""
    if not records and not is_row_id(row):
        raise RegistryError("no version's recipe is in MLflow any more to read this row by; ask by its row_id")
    found: dict[str, None] = {} if records else {row.strip(): None}
    refused: DataError | None = None
    for recorded in records:
        try:
            found |= dict.fromkeys(row_ids_of(recorded.recipe, row))
        except DataError as error:
            refused = error
    if refused is not None and not found:
        raise refused
    return list(found)


def _use(line: list[_Relative], row_id: str) -> RowUse:
    """What counts most of all that the line did with the row."""
    return min((one.use(row_id) for one in line), key=lambda use: WEIGHT.index(use.use))


def _load(run_id: str, path: str) -> dict[str, object]:
    try:
        loaded: dict[str, object] = mlflow.artifacts.load_dict(f"runs:/{run_id}/{path}")
    except MlflowException as error:
        raise RegistryError(f"MLflow run {run_id}: {path} cannot be read: {error.message}") from None
    return loaded
