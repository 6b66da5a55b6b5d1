"""One process at a time changes a registered model's versions and aliases.

The registry has no compare-and-swap, but a registered model's name is unique in every backend: who creates
`NAME.lock` holds the lock, and removes it after. A holder that died is passed over after STALE_SECONDS: its lock is
renamed before it is removed, which only one process can do, and put back if it turns out to be a fresh one.
"""

import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from mlflow.exceptions import MlflowException

from sft_core.errors import RegistryError
from tasks.tracking import client

STALE_SECONDS = 300.0
"""Nothing that is done under the lock takes more than seconds: no file is copied, no model judged."""
WAIT_SECONDS = 600.0
POLL_SECONDS = 0.2
GONE = ("RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS")


@contextmanager
def registry_lock(model_name: str) -> Iterator[None]:
    """Held inside the block. RegistryError if others hold it for WAIT_SECONDS."""
    name = f"{model_name}.lock"
    deadline = time.monotonic() + WAIT_SECONDS
    token = uuid.uuid4().hex
    while not _taken(name, token):
        if time.monotonic() > deadline:
            raise RegistryError(f"{name}: held by others for {WAIT_SECONDS:g} s; delete that registered model, if none")
        _pass_over(name)
        time.sleep(POLL_SECONDS)
    try:
        yield
    finally:
        with suppress(MlflowException):  # gone: it was passed over as stale
            if client().get_registered_model(name).description == token:
                client().delete_registered_model(name)


def _taken(name: str, token: str) -> bool:
    try:
        client().create_registered_model(name, description=token)
    except MlflowException as error:
        if error.error_code in GONE:
            return False
        raise
    return True


def _pass_over(name: str) -> None:
    """Remove the lock if its holder must be dead."""
    try:
        taken_at = client().get_registered_model(name).creation_timestamp / 1000
        if time.time() - taken_at < STALE_SECONDS:
            return
        grave = f"{name}.{uuid.uuid4().hex}"
        client().rename_registered_model(name, grave)
        buried_at = client().get_registered_model(grave).creation_timestamp / 1000
        if buried_at != taken_at:  # a fresh one, taken since: put it back
            client().rename_registered_model(grave, name)
            return
        client().delete_registered_model(grave)
    except MlflowException as error:
        if error.error_code not in GONE:
            raise
