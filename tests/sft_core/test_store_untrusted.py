"""Manifests, hints and leases that nobody of ours wrote, or that a power cut tore: not believed, and built anew."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sft_core import lease
from sft_core.errors import StoreError
from sft_core.lease import hold, live_holder
from sft_core.shards import parse_shard_list
from sft_core.store import Store
from sft_core.store_survey import damage, survey
from tests.sft_core.manifests import manifest_of
from tests.sft_core.test_store import FINGERPRINT, publish, store
from tests.sft_core.test_store_lease import files

__all__ = ["files", "store"]
HELLO = {"size": 5, "sha256": hashlib.sha256(b"hello").hexdigest()}
Edit = Callable[[dict[str, Any]], Any]


def manifest_path(store: Store) -> str:
    return f"{store.address('pack', FINGERPRINT)}/manifest.json"


def edited(store: Store, edit: Edit) -> None:
    """Rewrite the artifact's manifest as `edit` gives it."""
    whole = json.loads(store.files.cat_file(manifest_path(store)))
    store.files.write(manifest_path(store), json.dumps(edit(whole)).encode())


@pytest.mark.parametrize(
    "text",
    [b"", b"\0" * 300, b'{"kind": "Packed', b"[]", b"null", b"7", b"\xff\xfe", b"[" * 100_000, b'{"files": []}'],
    ids=["empty", "zeros", "cut", "list", "null", "number", "no UTF-8", "deep", "other keys"],
)
def test_a_torn_manifest_counts_as_absent_and_the_step_is_published_again(store: Store, text: bytes) -> None:
    publish(store)
    store.files.write(manifest_path(store), text)
    assert store.find("pack", FINGERPRINT) is None
    assert store.manifests("pack") == []
    again = publish(store, "again")
    assert store.find("pack", FINGERPRINT) == again
    assert (store.local(store.artifact("pack", FINGERPRINT)) / "sub" / "data.txt").read_text() == "again"


LIES: list[tuple[str, Edit]] = [
    ("a key too few", lambda m: {key: value for key, value in m.items() if key != "device"}),
    ("a key too many", lambda m: {**m, "more": 1}),
    ("no files", lambda m: {**m, "files": {}}),
    ("files as a list", lambda m: {**m, "files": ["sub/data.txt"]}),
    ("a text as size", lambda m: {**m, "files": {"sub/data.txt": {**HELLO, "size": "5"}}}),
    ("true as size", lambda m: {**m, "files": {"sub/data.txt": {**HELLO, "size": True}}}),
    ("another size", lambda m: {**m, "files": {"sub/data.txt": {**HELLO, "size": 6}}}),
    ("a short hash", lambda m: {**m, "files": {"sub/data.txt": {**HELLO, "sha256": "ab"}}}),
    ("a number as hash", lambda m: {**m, "files": {"sub/data.txt": {**HELLO, "sha256": 5}}}),
    ("a file outside", lambda m: {**m, "files": {"../../outside": HELLO}}),
    ("an absolute file", lambda m: {**m, "files": {"/etc/hostname": HELLO}}),
    ("a detour", lambda m: {**m, "files": {"sub/../sub/data.txt": HELLO}}),
    ("itself", lambda m: {**m, "files": {**m["files"], "manifest.json": HELLO}}),
    ("another fingerprint", lambda m: {**m, "fingerprint": "cd" * 32}),
    ("another step", lambda m: {**m, "step": "train"}),
    ("another kind", lambda m: {**m, "kind": "Checkpoint"}),
    ("inputs that are none", lambda m: {**m, "inputs": {"conversations": 5}}),
    ("facts as a list", lambda m: {**m, "facts": []}),
    ("a ledger without sums", lambda m: {**m, "ledger": {"rows": {"in": 1}}}),
    ("no time", lambda m: {**m, "started": "yesterday"}),
    ("no duration", lambda m: {**m, "took_seconds": "long"}),
]


@pytest.mark.parametrize("edit", [lie for _, lie in LIES], ids=[name for name, _ in LIES])
def test_a_manifest_that_lies_is_not_believed(store: Store, edit: Edit) -> None:
    publish(store)
    store.files.write(f"{store.files.root}/outside", b"hello")
    edited(store, edit)
    assert store.find("pack", FINGERPRINT) is None
    publish(store, "again")
    assert (store.local(store.artifact("pack", FINGERPRINT)) / "sub" / "data.txt").read_text() == "again"


def test_a_torn_manifest_is_found_by_verify(tmp_path: Path) -> None:
    from datetime import UTC, datetime

    store = Store(str(tmp_path))
    publish(store)
    Path(manifest_path(store)).write_bytes(b"")
    (entry,) = survey(store, datetime.now(UTC))
    assert entry.kind == "torn"
    assert damage(store, entry) == [f"{tmp_path}/pack/{FINGERPRINT}: no manifest, or not one that can be read"]


def sharded(store: Store, shards: list[dict[str, Any]]) -> None:
    """An artifact with this list of shards, remembered as the last one of `test/pack`."""
    with store.staging("pack") as folder:
        (folder / "train").mkdir()
        (folder / "train" / "part-00000.parquet").write_text("hello")
        (folder / "shards.json").write_text(json.dumps(shards))
        store.publish(folder, manifest_of(folder, FINGERPRINT))
    store.remember("test/pack", "pack", FINGERPRINT)


SHARD = {"name": "part-00000", "key": "k", "files": {"train/*.parquet": HELLO}, "facts": {}, "place": {}}


def test_shards_of_an_altered_list_are_made_anew(store: Store) -> None:
    sharded(store, [SHARD])
    assert store.earlier("test/pack").find("k") is not None
    path = f"{store.address('pack', FINGERPRINT)}/shards.json"
    store.files.write(path, json.dumps([{**SHARD, "facts": []}]).encode())  # as long as it was
    assert store.earlier("test/pack").find("k") is None
    store.files.write(f"{store.files.root}/latest/test/pack", b"\xff../..")
    assert store.earlier("test/pack").find("k") is None


def test_a_shard_outside_of_its_folder_is_refused() -> None:
    with pytest.raises(StoreError, match="part-00000 names a file outside of its folder"):
        parse_shard_list(json.dumps([{**SHARD, "files": {"../../*.parquet": HELLO}}]).encode(), "shards.json")
    assert parse_shard_list(json.dumps([SHARD]).encode(), "shards.json")[0].name == "part-00000"


@pytest.mark.parametrize(
    "change",
    [
        {"seconds": "long"},
        {"seconds": 1e18},
        {"seconds": None},
        {"seconds": -1},
        {"pid": [1]},
        {"pid": "1"},
        {"machine": 7},
        {"renewed": "yesterday"},
        {"renewed": "2026-01-01T00:00:00"},
        {"renewed": 5},
        {"released": "no"},
    ],
    ids=str,
)
def test_a_lease_with_wrong_types_runs_out_like_a_torn_one(
    files: Any, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    from datetime import UTC, datetime

    monkeypatch.setattr(lease, "LEASE_SECONDS", 0.5)
    folder, now = f"{files.root}/l", datetime.now(UTC)
    whole = {"host": "far", "pid": 1, "machine": "other", "born": "1", "token": "t", "seconds": 1e9}
    rest = {"renewed": now.isoformat(), "beat": 0, "released": False}
    files.write(f"{folder}/00000001.json", json.dumps({**whole, **rest, "seconds": 1.0, **change}).encode())
    assert live_holder(files, folder, now) is None
    with hold(files, folder, "work", lambda _: None):
        assert files.names(folder) == ["00000002.json"]
