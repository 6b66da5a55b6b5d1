"""The registry's lock: one holder at a time, whatever clocks and models say."""

import json
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from mlflow.entities import ViewType
from mlflow.tracking import MlflowClient

from sft_core import lease
from sft_core.errors import RegistryError
from sft_core.lease import Holder, Lease
from tasks import registry_lock
from tasks.registry_lock import HOLDER, LOCK, LockFiles
from tests.tasks.models_project import ROOT, empty_registry, environment

__all__ = ["empty_registry"]
FIRST = "sft-flows lock of orders 00000001"
THREAD_SECONDS = 300
DIES = """
import os
from tasks.registry_lock import registry_lock
with registry_lock("orders"):
    os._exit(9)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds in place of minutes."""
    monkeypatch.setattr(registry_lock, "WAIT_SECONDS", 1.0)
    monkeypatch.setattr(lease, "LOOK_SECONDS", 0.1)
    monkeypatch.setattr(lease, "SAY_SECONDS", 0.1)


def take() -> None:
    with registry_lock.registry_lock("orders"):
        pass


def of_another_machine(client: MlflowClient, seconds: float) -> None:
    """A holder of which nothing is known here, by a clock that is ten minutes behind."""
    renewed = datetime.fromtimestamp(time.time() - 600, UTC).isoformat()
    holder = Holder(host="far", pid=1, machine="another", born="1", seconds=seconds, renewed=renewed)
    client.create_experiment(FIRST, tags={LOCK: "orders", HOLDER: holder.as_bytes().decode()})


def seen(client: MlflowClient) -> list[str]:
    """Experiments that a person sees."""
    return [experiment.name for experiment in client.search_experiments() if experiment.name != "Default"]


def test_one_holds_it_and_gives_it_back(empty_registry: MlflowClient) -> None:
    with registry_lock.registry_lock("orders"):
        assert seen(empty_registry) == [FIRST]
        with pytest.raises(
            RegistryError, match="the registry's lock of orders: held by others for 1 s; delete the exp"
        ):
            take()
    assert seen(empty_registry) == []
    take()
    with pytest.raises(ZeroDivisionError), registry_lock.registry_lock("orders"):
        _ = 1 / 0
    take()
    assert seen(empty_registry) == []
    assert list(empty_registry.search_registered_models()) == []


def test_of_many_at_once_one_holds_it(empty_registry: MlflowClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry_lock, "WAIT_SECONDS", THREAD_SECONDS)
    inside, most = list[int](), list[int]()

    def work() -> None:
        with registry_lock.registry_lock("orders"):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.05)
            inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(THREAD_SECONDS)
    assert most == [1] * 4


def test_what_another_one_deleted_between_look_and_delete_is_no_fault(
    empty_registry: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, path = registry_lock.LockFiles("orders"), "orders/00000001.json"
    assert files.create(path, b'{"released": false}')
    as_seen = empty_registry.get_experiment_by_name(seen(empty_registry)[0])
    files.remove(path)
    assert seen(empty_registry) == []
    for request in (lambda: files.remove(path), lambda: files.write(path, b'{"released": false}')):
        looks = iter([as_seen])
        find = registry_lock.LockFiles._find
        monkeypatch.setattr(files, "_find", lambda path, looks=looks, find=find: next(looks, None) or find(files, path))
        request()
        assert next(looks, None) is None


def test_a_clock_that_is_ten_minutes_off_lets_nobody_in(
    empty_registry: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = time.time
    with registry_lock.registry_lock("orders"):
        for off in (600.0, -600.0):
            monkeypatch.setattr(time, "time", lambda off=off: real() + off)
            with pytest.raises(RegistryError, match="held by others"):
                take()


def test_a_live_holder_whose_clock_is_ten_minutes_behind_is_waited_for(empty_registry: MlflowClient) -> None:
    of_another_machine(empty_registry, seconds=30.0)
    with pytest.raises(RegistryError, match="held by others"):
        take()
    assert seen(empty_registry) == [FIRST]


def test_a_holder_on_another_machine_is_passed_over_once_it_is_silent(empty_registry: MlflowClient) -> None:
    of_another_machine(empty_registry, seconds=0.5)
    take()
    assert seen(empty_registry) == []


def test_a_process_of_this_machine_that_died_is_passed_over_at_once(
    empty_registry: MlflowClient, tmp_path: Path
) -> None:
    settings = environment(tmp_path, tmp_path / "mlflow.db")
    died = subprocess.run([sys.executable, "-c", DIES], cwd=ROOT, env=settings, timeout=THREAD_SECONDS, check=False)
    assert died.returncode == 9
    assert seen(empty_registry) == [FIRST]
    take()
    assert seen(empty_registry) == []


def test_a_model_that_is_called_like_a_lock_is_left_alone(empty_registry: MlflowClient, tmp_path: Path) -> None:
    for name in ("orders.lock", FIRST):
        empty_registry.create_registered_model(name, description="of a process that died")
        empty_registry.create_model_version(name, str(tmp_path))
    take()
    with registry_lock.registry_lock("orders.lock"):
        take()
    models = empty_registry.search_registered_models()
    assert [(model.name, len(model.latest_versions)) for model in models] == [("orders.lock", 1), (FIRST, 1)]


def test_a_lock_that_was_cleared_away_can_be_taken_again(empty_registry: MlflowClient) -> None:
    with registry_lock.registry_lock("orders"):
        experiment = empty_registry.get_experiment_by_name(FIRST)
        empty_registry.delete_experiment(experiment.experiment_id)  # by hand: the holder is given up
        take()
    everything = empty_registry.search_experiments(ViewType.ALL, filter_string=f"tags.`{LOCK}` = 'orders'")
    assert sorted(experiment.name[-8:] for experiment in everything) == ["00000001", "00000002"]


def test_a_holder_that_was_suspended_is_told(empty_registry: MlflowClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "LEASE_SECONDS", 0.4)
    files = LockFiles("orders")

    def work(held: Lease) -> None:
        """Another one takes over meanwhile, and holds on."""
        other = {**json.loads(files.cat_file("orders/00000001.json")), "token": "another", "seconds": 60.0}
        assert files.create("orders/00000002.json", json.dumps(other).encode())
        deadline = time.monotonic() + THREAD_SECONDS
        while not held.lost and time.monotonic() < deadline:
            time.sleep(0.05)

    with (
        pytest.raises(RegistryError, match="orders: this process was silent for too long"),
        registry_lock.registry_lock("orders") as held,
    ):
        work(held)
