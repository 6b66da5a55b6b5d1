"""What lies in the temporary folder under a name that anyone can guess is this user's alone."""

import os
import tempfile
from pathlib import Path

import pytest

from sft_core.errors import StoreError
from sft_core.private import private_folder
from sft_core.store import Store

UID = os.geteuid()
NOBODY = 65534


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_state_of_a_remote_store_lies_in_folders_of_this_user_alone(temporary: Path) -> None:
    before = os.umask(0)
    try:
        store = Store("memory://bucket")
        work, cache = store.work_in_progress("train", "ab" * 32), store.cache.root
    finally:
        os.umask(before)
    assert {path.name: mode(path) for path in temporary.iterdir()} == {
        f"sft-work-{UID}": 0o700,
        f"sft-store-cache-{UID}": 0o700,
    }
    assert work.is_relative_to(temporary / f"sft-work-{UID}")
    assert cache.is_relative_to(temporary / f"sft-store-cache-{UID}")


def test_a_folder_that_others_could_write_to_is_refused(temporary: Path) -> None:
    (temporary / f"sft-work-{UID}").mkdir()
    (temporary / f"sft-work-{UID}").chmod(0o1777)
    with pytest.raises(StoreError, match="not a folder of this user alone .* set TMPDIR to a folder of your own"):
        Store("memory://bucket").work_in_progress("train", "ab" * 32)


def test_a_link_is_refused(temporary: Path) -> None:
    (temporary / "elsewhere").mkdir()
    (temporary / f"x-{UID}").symlink_to(temporary / "elsewhere")
    with pytest.raises(StoreError, match="not a folder of this user alone"):
        private_folder("x")


@pytest.mark.skipif(UID != 0, reason="only root can give a folder away")
def test_a_folder_of_another_user_is_refused(temporary: Path) -> None:
    (temporary / f"x-{UID}").mkdir(mode=0o700)
    os.chown(temporary / f"x-{UID}", NOBODY, NOBODY)
    with pytest.raises(StoreError, match=f"owner {NOBODY}"):
        private_folder("x")


def test_one_that_others_could_only_read_is_closed_to_them(temporary: Path) -> None:
    (temporary / f"x-{UID}").mkdir(mode=0o755)
    assert mode(private_folder("x")) == 0o700
