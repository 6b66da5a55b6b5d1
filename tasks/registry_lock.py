"""One process at a time changes a registered model's versions and aliases.

In: a registered model's name. Out: a lease (`sft_core/lease.py`), held inside a block: a holder that dies is replaced
at once on its own machine, elsewhere after LEASE_SECONDS without a sign of life, timed by the waiter's own clock.

The lease's files are experiments of MLflow's: the registry has no compare-and-swap, but an experiment's name is unique,
and its tags come with it in one transaction. While it is held the experiment can be seen; released, it is deleted (as
MLflow deletes: `mlflow gc` clears it away). Nothing in the registry is called like a lock, whatever models are called.
"""

import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar, cast

from mlflow.entities import ViewType
from mlflow.exceptions import MlflowException

from sft_core.errors import RegistryError, StoreError
from sft_core.lease import Lease, hold
from sft_core.store_files import StoreFiles
from tasks.patience import TrackingError, first_line
from tasks.tracking import client

WAIT_SECONDS = 600.0
"""Nothing that is done under the lock takes more than seconds: no file is copied, no model judged."""
UPLOAD = "upload "
LOCK, HOLDER = "sft.lock", "sft.lock_holder"
"""Tags of an experiment that is a lock: the registered model's name; who holds it, as JSON."""
Value = TypeVar("Value")


@contextmanager
def registry_lock(model_name: str) -> Iterator[Lease]:
    """Held inside the block. RegistryError if others hold it for WAIT_SECONDS, or if it was lost meanwhile."""
    held: Lease | None = None
    try:
        with _lock(model_name, f"the registry's lock of {model_name}", WAIT_SECONDS) as held:
            yield held
            require_held(held, model_name)
    except StoreError:  # what failed inside, failed of the loss
        if held is not None:
            require_held(held, model_name)
        raise


def upload_lock(merged_fingerprint: str, wait_seconds: float = math.inf) -> AbstractContextManager[Lease]:
    """Held while a merged model is copied into MLflow. RegistryError if others hold it for `wait_seconds`."""
    return _lock(f"{UPLOAD}{merged_fingerprint}", f"the upload of merge {merged_fingerprint[:12]}", wait_seconds)


@contextmanager
def _lock(name: str, what: str, wait_seconds: float) -> Iterator[Lease]:
    deadline = time.monotonic() + wait_seconds

    def waiting(line: str) -> None:
        if time.monotonic() > deadline:
            raise RegistryError(
                f"{what}: held by others for {wait_seconds:g} s; delete the experiment {_name(name)}..., if none"
            )
        logging.getLogger(__name__).info(line)

    with hold(cast(StoreFiles, LockFiles(name)), name, what, waiting) as lease:
        yield lease


def require_held(lease: Lease, model_name: str) -> None:
    """RegistryError once another process has taken over: this one was suspended for too long."""
    if lease.lost:
        raise RegistryError(
            f"{model_name}: this process was silent for too long, and another one may have changed its versions; look "
            "at `sft models list`, then run again"
        )


class LockFiles:
    """The few operations on files that a lease needs, on experiments. Paths are `NAME/00000001.json`. StoreError where
    MLflow fails."""

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name

    def names(self, folder: str) -> list[str]:
        """The newest file's name, if there ever was one."""
        newest = _asked(
            lambda: client().search_experiments(
                ViewType.ALL, 1, f"tags.`{LOCK}` = '{self._model_name}'", order_by=["name DESC"]
            )
        )
        return [f"{experiment.name.removeprefix(_name(self._model_name))}.json" for experiment in newest]

    def cat_file(self, path: str) -> bytes:
        """Who holds it, or held it. FileNotFoundError if there is no such experiment."""
        found = self._look_up(path)
        if found is None or HOLDER not in found.tags:
            raise FileNotFoundError(path)
        if found.lifecycle_stage == "active":
            return str(found.tags[HOLDER]).encode()
        return json.dumps({**json.loads(found.tags[HOLDER]), "released": True}).encode()

    def create(self, path: str, data: bytes) -> bool:
        """Whether this call made the experiment. Of two at once one gets True."""
        tags = {LOCK: self._model_name, HOLDER: data.decode()}
        try:
            _asked(lambda: client().create_experiment(self._experiment(path), tags=tags))
        except FileExistsError:
            found = self._look_up(path)  # a try that was not answered may have been ours
            return found is not None and found.tags.get(HOLDER) == data.decode()
        return True

    def write(self, path: str, data: bytes) -> None:
        """Tell of a sign of life; a release deletes the experiment."""
        self._change(path, lambda number: client().set_experiment_tag(number, HOLDER, data.decode()))
        if json.loads(data)["released"]:
            self.remove(path)

    def remove(self, path: str) -> None:
        """Delete the experiment; nothing happens where there is none."""
        self._change(path, lambda number: client().delete_experiment(number))

    def _change(self, path: str, request: Callable[[str], object]) -> None:
        """Ask it of the experiment, by its number, while that is there; another process may delete it in between."""
        found = self._find(path)
        if found is None:
            return
        try:
            _asked(lambda: request(found.experiment_id))
        except StoreError:
            if self._find(path) is not None:
                raise

    def _find(self, path: str) -> Any:
        """The experiment, None where it is deleted or was never there."""
        found = self._look_up(path)
        return found if found is not None and found.lifecycle_stage == "active" else None

    def _look_up(self, path: str) -> Any:
        """The experiment, deleted or not."""
        return _asked(lambda: client().get_experiment_by_name(self._experiment(path)))

    def _experiment(self, path: str) -> str:
        return _name(self._model_name) + path.rpartition("/")[2].removesuffix(".json")


def _name(model_name: str) -> str:
    return f"sft-flows lock of {model_name} "


def _asked(request: Callable[[], Value]) -> Value:
    try:
        return request()
    except MlflowException as error:
        if error.error_code == "RESOURCE_ALREADY_EXISTS":
            raise FileExistsError from None
        raise StoreError(f"MLflow: {first_line(error)}") from error
    except TrackingError as error:
        raise StoreError(str(error)) from error
