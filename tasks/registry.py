"""What the MLflow registry holds of a registered model: versions with their tags, aliases, bars, history.

In: a model's name. Out: `RegisteredVersion`s. Reads, and writes single tags; who may move an alias, and when, is
decided in `tasks/register.py` and `tasks/models.py`. Any other answer of the registry than yes or no raises.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import mlflow
from mlflow.exceptions import MlflowException

from sft_core.errors import RegistryError
from sft_core.markdown import as_text
from tasks.tracking import client, download_model

MERGED = "sft.merged_fingerprint"
VERDICT = "sft.verdict"
PROMOTE = "sft.promote"
"""`true` or `false`: what the gate decided."""
JUDGED_AGAINST = "sft.judged_against"
"""Number of the champion that the version was judged against, or NO_CHAMPION."""
NO_CHAMPION = "none"
AS_BASE = "sft.as_base_model"
"""What the version's files are called as a base model (`sft_core.base_model`): a model tuned from a copy names it."""
SETTLED = "sft.settled"
"""Set after the aliases were moved: nothing of the version's registration is left to do."""
REPLACED = "sft.replaced"
"""Number of the champion that this version took over from."""
BARRED = "sft.barred"
"""Why a version was rolled back or rejected. It, and any later version of its merged model, never becomes champion."""
HISTORY = "sft.history."
"""Tags of the registered model, one a change of `champion`: the time, then what was done and why."""
RUN = "sft.mlflow_run_id"
VERDICT_TABLE = "verdict.md"
"""Artifact of that run: the gate's figures, for people."""
MAX_TAG_LENGTH = 4000


@dataclass(frozen=True, slots=True)
class RegisteredVersion:
    """A version of a registered model: its number, the merged model it holds, its aliases and tags."""

    number: str
    merged_fingerprint: str
    aliases: tuple[str, ...]
    tags: Mapping[str, str]

    @property
    def verdict(self) -> str:
        """The gate's words."""
        return self.tags.get(VERDICT, "")

    @property
    def settled(self) -> bool:
        """Whether its registration was finished."""
        return SETTLED in self.tags


def find_version(model_name: str, merged_fingerprint: str) -> RegisteredVersion | None:
    """The version that holds this merged model, if there is one."""
    query = f"name = '{model_name}' and tags.`{MERGED}` = '{merged_fingerprint}'"
    found = client().search_model_versions(query)
    return read_version(model_name, min((v.version for v in found), key=int)) if found else None


def find_tagged(tag: str, value: str) -> tuple[str, RegisteredVersion] | None:
    """Name and version of the first one, of any registered model, that has this tag."""
    entry = next(_search(f"tags.`{tag}` = '{value}'"), None)
    return (str(entry.name), read_version(entry.name, str(entry.version))) if entry is not None else None


def find_champion(model_name: str) -> RegisteredVersion | None:
    """The version that consumers load, if there is one."""
    number = read_aliases(model_name).get("champion")
    return read_version(model_name, number) if number is not None else None


def read_version(model_name: str, wanted: str) -> RegisteredVersion:
    """By number or alias. RegistryError if there is none such, or if this project did not register it."""
    aliases = read_aliases(model_name)
    number = aliases.get(wanted, wanted)
    try:
        entry = client().get_model_version(model_name, number)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        known = ", ".join(f"@{alias}" for alias in sorted(aliases)) or "no alias"
        raise RegistryError(
            f"models:/{model_name}/{wanted}: no such version or alias (there is {known}); `sft models list` shows all"
        ) from None
    if MERGED not in entry.tags:
        raise RegistryError(
            f"models:/{model_name}/{number} was not registered by sft-flows (no tag {MERGED}); use another name "
            "(register.model_name)"
        )
    names = tuple(sorted(alias for alias, at in aliases.items() if at == str(number)))
    return RegisteredVersion(str(number), entry.tags[MERGED], names, dict(entry.tags))


def read_versions(model_name: str) -> list[RegisteredVersion]:
    """All versions that this project registered under `model_name`, oldest first."""
    aliases = read_aliases(model_name)
    found = []
    for entry in _search(f"name = '{model_name}'"):
        if MERGED in entry.tags:
            names = tuple(sorted(alias for alias, at in aliases.items() if at == str(entry.version)))
            found.append(RegisteredVersion(str(entry.version), entry.tags[MERGED], names, dict(entry.tags)))
    return sorted(found, key=lambda version: int(version.number))


def model_names() -> list[str]:
    """Registered models that hold a version of this project's."""
    return sorted({str(entry.name) for entry in _search("") if MERGED in entry.tags})


def read_aliases(model_name: str) -> dict[str, str]:
    """Version numbers by alias; empty where there is no such model."""
    try:
        return {alias: str(at) for alias, at in client().get_registered_model(model_name).aliases.items()}
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return {}
        raise


def read_model_tags(model_name: str) -> dict[str, str]:
    """Tags of the registered model itself; empty where there is no such model."""
    try:
        return dict(client().get_registered_model(model_name).tags)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return {}
        raise


def model_folder(model_name: str, registered: RegisteredVersion) -> Path:
    """Local copy of a registered version's files."""
    return download_model(f"models:/{model_name}/{registered.number}")


def bar(model_name: str, version: RegisteredVersion, reason: str) -> None:
    """Keep the version's merged model from ever becoming champion again; it outlives the version's deletion."""
    client().set_model_version_tag(model_name, version.number, BARRED, reason[:MAX_TAG_LENGTH])
    client().set_registered_model_tag(model_name, _bar_key(version.merged_fingerprint), reason[:MAX_TAG_LENGTH])


def barred_because(model_name: str, merged_fingerprint: str) -> str | None:
    """Why this merged model was rolled back or rejected, if it was."""
    return read_model_tags(model_name).get(_bar_key(merged_fingerprint))


def write_history(model_name: str, words: str) -> None:
    """Add a line to the history of the alias `champion`."""
    stamp = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    client().set_registered_model_tag(model_name, f"{HISTORY}{stamp}", words[:MAX_TAG_LENGTH])


def read_history(model_name: str) -> list[tuple[str, str]]:
    """(time, what was done and why), oldest first."""
    tags = client().get_registered_model(model_name).tags
    return sorted((key.removeprefix(HISTORY), words) for key, words in tags.items() if key.startswith(HISTORY))


def read_verdict_table(version: RegisteredVersion) -> str:
    """The gate's figures as Markdown, as its retraining logged them; the gate's words where they are gone."""
    try:
        return str(mlflow.artifacts.load_text(f"runs:/{version.tags.get(RUN)}/{VERDICT_TABLE}"))
    except MlflowException:
        return as_text(version.verdict)


def _bar_key(merged_fingerprint: str) -> str:
    return f"{BARRED}.{merged_fingerprint}"


def _search(query: str) -> Iterator[Any]:
    token = None
    while True:
        page = client().search_model_versions(query, page_token=token)
        yield from page
        token = page.token
        if not token:
            return
