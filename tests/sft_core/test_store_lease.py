"""A lease has one holder; a dead one is replaced within its bound, and a suspended one notices."""

import json
import os
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from sft_core import lease
from sft_core.errors import StoreError
from sft_core.lease import Holder, hold, live_holder
from sft_core.store_files import StoreFiles

LONG = 60.0
"""Bound on a wait of a thread; everything here takes a second or two."""


@pytest.fixture(params=["disk", "memory"])
def files(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StoreFiles:
    monkeypatch.setattr(lease, "LEASE_SECONDS", 3.0)
    monkeypatch.setattr(lease, "LOOK_SECONDS", 0.05)
    return StoreFiles(str(tmp_path) if request.param == "disk" else f"memory://{tmp_path.name}")


def elsewhere(files: StoreFiles, folder: str, number: int = 1, **changes: object) -> None:
    """A holder on a machine of which nothing is known here."""
    holder = Holder(host="far", pid=1, machine="another", born="1", seconds=1.0, renewed=datetime.now(UTC).isoformat())
    files.write(f"{folder}/{number:08d}.json", json.dumps({**json.loads(holder.as_bytes()), **changes}).encode())


def test_only_one_holds_at_a_time(files: StoreFiles) -> None:
    folder, inside, most = f"{files.root}/l", [], []

    def work() -> None:
        with hold(StoreFiles(files.url), folder, "work", lambda _: None):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.1)
            inside.pop()

    threads = [threading.Thread(target=work) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
    assert most == [1] * 5


def test_a_holder_that_renews_is_waited_for_longer_than_its_lease(files: StoreFiles) -> None:
    folder, order, lines = f"{files.root}/l", [], []

    def second() -> None:
        with hold(files, folder, "training ab", lines.append):
            order.append("second")

    thread = threading.Thread(target=second)
    with hold(files, folder, "training ab") as first:
        thread.start()
        time.sleep(2.5 * lease.LEASE_SECONDS)
        order.append("first")
        assert not first.lost
    thread.join(LONG)
    assert order == ["first", "second"]
    assert len(lines) == 1
    assert f"training ab is held by process {os.getpid()} on " in lines[0]


def test_a_silent_holder_is_replaced_whatever_its_clock_says(files: StoreFiles) -> None:
    folder, lines = f"{files.root}/l", []
    elsewhere(files, folder, 7, renewed="2099-01-01T00:00:00+00:00")
    with hold(files, folder, "training ab", lines.append):
        assert files.names(folder) == ["00000008.json"]
    assert lines[-1] == "note: training ab was held by process 1 on far, which is gone; taking over"


def test_a_killed_process_of_this_machine_is_replaced_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "LOOK_SECONDS", 0.05)  # and the lease stays 60 s long
    files, folder = StoreFiles(str(tmp_path)), f"{tmp_path}/l"
    program = (
        "import sys, time; from sft_core.lease import hold; from sft_core.store_files import StoreFiles\n"
        f"with hold(StoreFiles({str(tmp_path)!r}), {folder!r}, 'x'): print('held', flush=True); time.sleep(600)"
    )
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    assert live_holder(files, folder, datetime.now(UTC)) is not None
    child.kill()
    child.wait()
    assert live_holder(files, folder, datetime.now(UTC)) is None
    lines: list[str] = []
    with hold(files, folder, "training ab", lines.append):
        pass
    assert lines == [
        f"note: training ab was held by process {child.pid} on {Holder(seconds=1).host}, which is gone; taking over"
    ]


def test_a_suspended_holder_notices_that_it_lost(files: StoreFiles) -> None:
    folder = f"{files.root}/l"
    with hold(files, folder, "training ab") as first:
        elsewhere(files, folder, 2)  # what a waiter does that saw no renewal
        deadline = time.monotonic() + LONG
        while not first.lost and time.monotonic() < deadline:
            time.sleep(0.05)
        with pytest.raises(StoreError, match="training ab: this process was silent for over 3 s, and another one took"):
            first.check()
    assert json.loads(files.cat_file(f"{folder}/00000002.json"))["host"] == "far"


def test_a_holder_that_looks_notices_at_once(files: StoreFiles) -> None:
    folder = f"{files.root}/l"
    with hold(files, folder, "training ab") as first:
        first.confirm()
        elsewhere(files, folder, 2)
        with pytest.raises(StoreError, match="another one took over"):
            first.confirm()
    with hold(files, f"{files.root}/m", "training ab") as first:
        files.remove(f"{files.root}/m/00000001.json")  # the next one has done its work, and tidied up
        assert not first.look()
    assert files.names(f"{files.root}/m") == []  # and it does not write it again


def test_what_fails_behind_a_lost_lease_failed_of_that(files: StoreFiles) -> None:
    def fail(folder: str, lost: bool) -> None:
        with hold(files, folder, "training ab"):
            if lost:
                elsewhere(files, folder, 2)
            raise FileNotFoundError("a folder is gone")

    with pytest.raises(StoreError, match="another one took over"):
        fail(f"{files.root}/l", lost=True)
    with pytest.raises(FileNotFoundError):
        fail(f"{files.root}/m", lost=False)


def test_a_holder_that_is_done_for_good_leaves_nothing(files: StoreFiles) -> None:
    with hold(files, f"{files.root}/l", "training ab") as first:
        first.forget()
    assert files.names(f"{files.root}/l") == []


def test_a_lease_that_is_half_written_runs_out_too(files: StoreFiles) -> None:
    folder = f"{files.root}/l"
    files.write(f"{folder}/00000001.json", b'{"host": "f')
    with hold(files, folder, "work", lambda _: None):
        assert files.names(folder) == ["00000002.json"]


def test_a_lease_that_was_not_renewed_for_long_is_not_live(files: StoreFiles) -> None:
    folder, now = f"{files.root}/l", datetime.now(UTC)
    assert live_holder(files, folder, now) is None
    elsewhere(files, folder)
    assert live_holder(files, folder, now) is not None
    assert live_holder(files, folder, now + timedelta(minutes=1)) is None
