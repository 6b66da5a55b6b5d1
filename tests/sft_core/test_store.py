"""The store: complete or absent, never half; first writer wins; bytes are checked where they are read."""

from pathlib import Path

import fsspec
import pytest

from sft_core.artifacts import Manifest, check_ledger
from sft_core.errors import StoreError
from sft_core.store import Store
from tests.sft_core.manifests import manifest_of

FINGERPRINT = "ab" * 32


def publish(store: Store, text: str = "hello", fingerprint: str = FINGERPRINT) -> Manifest:
    with store.staging("pack") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "data.txt").write_text(text)
        return store.publish(folder, manifest_of(folder, fingerprint, seed=1))


@pytest.fixture(params=["disk", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store")) if request.param == "disk" else Store(f"memory://{tmp_path.name}")


def test_what_was_published_is_found_and_read_back(store: Store) -> None:
    assert store.find("pack", FINGERPRINT) is None
    manifest = publish(store)
    assert store.find("pack", FINGERPRINT) == manifest
    assert list(manifest.files) == ["sub/data.txt"]
    folder = store.local(store.artifact("pack", FINGERPRINT))
    assert (folder / "sub" / "data.txt").read_text() == "hello"
    assert [m.fingerprint for m in store.manifests("pack")] == [FINGERPRINT]


def test_the_first_writer_wins(store: Store) -> None:
    first = publish(store, "first")
    second = publish(store, "second, and longer")
    assert second == first
    assert (store.local(store.artifact("pack", FINGERPRINT)) / "sub" / "data.txt").read_text() == "first"


def test_a_missing_file_makes_the_artifact_absent_and_a_rebuild_mends_it(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    publish(store)
    (tmp_path / "pack" / FINGERPRINT / "sub" / "data.txt").unlink()
    assert store.find("pack", FINGERPRINT) is None
    with pytest.raises(StoreError, match="is not in the store"):
        store.local(store.artifact("pack", FINGERPRINT))
    publish(store, "again")
    assert (store.local(store.artifact("pack", FINGERPRINT)) / "sub" / "data.txt").read_text() == "again"


def test_altered_bytes_of_the_same_size_are_refused_where_they_are_read(tmp_path: Path) -> None:
    publish(Store(str(tmp_path)))
    (tmp_path / "pack" / FINGERPRINT / "sub" / "data.txt").write_text("jello")
    with pytest.raises(StoreError, match=r"data\.txt: its bytes are not those that were written"):
        Store(str(tmp_path)).local(Store(str(tmp_path)).artifact("pack", FINGERPRINT))


def test_files_without_a_manifest_are_no_artifact(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    folder = tmp_path / "pack" / FINGERPRINT / "sub"
    folder.mkdir(parents=True)
    (folder / "data.txt").write_text("torn")
    assert store.find("pack", FINGERPRINT) is None
    publish(store, "whole")
    assert (store.local(store.artifact("pack", FINGERPRINT)) / "sub" / "data.txt").read_text() == "whole"


def test_work_in_progress_is_no_part_of_the_artifact(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    work = store.work_in_progress("pack", FINGERPRINT)
    work.mkdir(parents=True)
    (work / "state").write_text("x")
    assert list(publish(store).files) == ["sub/data.txt"]
    assert (work / "state").exists()


def test_staging_leaves_nothing_behind(tmp_path: Path) -> None:
    store = Store(str(tmp_path))

    def fail() -> None:
        with store.staging("pack") as folder:
            (folder / "half").write_text("x")
            raise RuntimeError("a step failed")

    with pytest.raises(RuntimeError):
        fail()
    assert list((tmp_path / ".staging").iterdir()) == []


def test_an_unknown_protocol_is_a_clear_error() -> None:
    with pytest.raises(StoreError, match="store 'nope://x'"):
        Store("nope://x")


def test_a_ledger_that_does_not_balance_is_noticed() -> None:
    check_ledger("pack", {"tokens": {"in": 3, "out": 1, "set_aside": {"overlong": 2}}})
    with pytest.raises(AssertionError, match="3 in, 1 out, 1 set aside"):
        check_ledger("pack", {"tokens": {"in": 3, "out": 1, "set_aside": {"overlong": 1}}})


def test_memory_stores_are_really_remote() -> None:
    assert not Store("memory://x").is_local
    assert isinstance(fsspec.filesystem("memory"), type(Store("memory://x").files.fs))
