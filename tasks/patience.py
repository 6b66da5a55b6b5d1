"""Waiting for an MLflow server that is away: restarted, upgraded, cut off.

In: calls of MLflow's client. Out: what they give, or TrackingError when the server has not answered for
`SFT_MLFLOW_PATIENCE_SECONDS` (600). A server's own answer, an error too, is passed on at once. Two bounds are at work:
MLflow's client tries a request again after 0, 4, 8 and 16 s (`MLFLOW_HTTP_REQUEST_MAX_RETRIES`: 4 here; MLflow's own 7
are 4 minutes); these calls start over until the patience is used up.
"""

import logging
import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import mlflow
import requests
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from sft_core.credentials import credentials_hidden, without_credentials
from sft_core.errors import SftError
from tasks.mlflow_database import migrate_current

PATIENCE = "SFT_MLFLOW_PATIENCE_SECONDS"
PATIENCE_SECONDS = 600.0
RETRY_SECONDS = 5.0
"""Between two rounds of tries."""
Value = TypeVar("Value")


class TrackingError(SftError):
    """The MLflow server did not answer in time."""


class PatientClient:
    """MlflowClient, every call of which waits for a server that is away."""

    def __init__(self, client: MlflowClient) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._client, name)
        return partial(patiently, found) if callable(found) else found


def new_client() -> MlflowClient:
    """Of the server or database that `MLFLOW_TRACKING_URI` names; gives up on one that is away after half a minute."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "4")
    migrate_current()
    return MlflowClient()


@credentials_hidden()
def patiently(call: Callable[..., Value], *arguments: Any, **options: Any) -> Value:
    """`call(*arguments, **options)`, again while no server answers. TrackingError when the patience is used up."""
    patience = float(os.environ.get(PATIENCE, PATIENCE_SECONDS))
    deadline = time.monotonic() + patience
    while True:
        try:
            return call(*arguments, **options)
        except MlflowException as error:
            if not is_away(error):
                raise
            if time.monotonic() + RETRY_SECONDS > deadline:
                raise TrackingError(
                    f"MLflow at {mlflow.get_tracking_uri()} has not answered for {patience:.0f} s ({PATIENCE}): "
                    f"{first_line(error)}. Start it, then run again: steps that are done are in the store."
                ) from error
            logging.getLogger(__name__).warning("MLflow does not answer, trying again: %s", first_line(error))
            time.sleep(RETRY_SECONDS)


def is_away(error: MlflowException) -> bool:
    """Whether nobody answered (or only a proxy did: 429, 5xx), as against an answer that says no."""
    return isinstance(error.__context__, requests.RequestException)


def first_line(error: Exception) -> str:
    """Of what an exception says, at most 200 characters."""
    return (without_credentials(str(error)).splitlines() or [""])[0][:200]
