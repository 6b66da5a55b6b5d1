"""MLflow makes and migrates its SQLite database at first use, and two processes that do so at once fail each other."""

import os
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

import mlflow
from mlflow.tracking import MlflowClient

from sft_core.file_lock import file_lock


@cache
def migrate_alone(tracking_uri: str, registry_uri: str) -> None:
    """Open both, one process at a time where they are SQLite files; a server's databases are its own affair."""
    for uri in dict.fromkeys((tracking_uri, registry_uri)):
        kind, _, place = uri.partition(":///")
        file = Path(place.partition("?")[0]).resolve()
        if not kind.startswith("sqlite") or not place or not os.access(_nearest(file.parent), os.W_OK):
            continue
        with file_lock(file.with_name(f".{file.name}.lock")):
            client = MlflowClient(uri, uri)
            client.search_experiments(max_results=1)
            client.search_registered_models(max_results=1)


def take_password_out() -> None:
    """Name and password of MLFLOW_TRACKING_URI go to the two variables that MLflow has for them: its client repeats the
    address in errors, logs and links. Processes that this one starts find it so."""
    url = urlsplit(os.environ.get("MLFLOW_TRACKING_URI", ""))
    name, at, host = url.netloc.rpartition("@")
    if not at or url.scheme not in ("http", "https"):
        return
    user, _, password = name.partition(":")
    os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"] = unquote(user), unquote(password)
    os.environ["MLFLOW_TRACKING_URI"] = url._replace(netloc=host).geturl()


def migrate_current() -> None:
    """The databases that MLFLOW_TRACKING_URI and MLFLOW_REGISTRY_URI name."""
    take_password_out()
    migrate_alone(mlflow.get_tracking_uri(), mlflow.get_registry_uri())


def _nearest(folder: Path) -> Path:
    """The folder, or the one above it that exists."""
    return next(parent for parent in (folder, *folder.parents) if parent.exists())
