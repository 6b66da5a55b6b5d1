"""What can go from a store: never what a registered version was made of, nor what was used lately or is in use."""

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from sft_core.artifacts import KIND_OF_STEP, Manifest
from sft_core.lease import hold
from sft_core.store import Store, list_files
from sft_core.store_gc import decide
from sft_core.store_survey import ARTIFACT, COPY, STAGED, TORN, WORK, Entry, damage, remove, survey

NOW = datetime.now(UTC)
OLD = NOW - timedelta(days=100)


def fingerprint(name: str) -> str:
    return name.encode().hex().ljust(64, "0")


def publish(store: Store, step: str, name: str, **inputs: str) -> str:
    with store.staging(step) as folder:
        (folder / "data").write_text(name)
        manifest = Manifest(
            kind=KIND_OF_STEP[step],
            step=step,
            name=f"test:{step}",
            fingerprint=fingerprint(name),
            parts={},
            inputs={key: fingerprint(value) for key, value in inputs.items()},
            files=list_files(folder),
            ledger={},
            facts={},
            versions={},
            device="cpu",
            started=OLD.isoformat(),
            took_seconds=0.0,
        )
        store.publish(folder, manifest)
    return fingerprint(name)


def age(folder: Path, days: float) -> None:
    """All of a folder was written so long ago."""
    then = NOW.timestamp() - days * 86400
    for path in [*folder.rglob("*"), folder]:
        os.utime(path, (then, then))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Two chains from one raw data set, all of it 100 days old."""
    store = Store(str(tmp_path / "store"))
    publish(store, "fetch", "raw")
    for chain in ("a", "b"):
        publish(store, "normalize", f"n{chain}", **{"raw/0": "raw"})
        publish(store, "pack", f"p{chain}", conversations=f"n{chain}")
        publish(store, "train", f"t{chain}", packed=f"p{chain}", base_model="base")
        publish(store, "merge", f"m{chain}", adapter=f"t{chain}")
    age(tmp_path / "store", 100)
    return store


def going(store: Store, registered: dict[str, str], keep_days: int = 30) -> set[str]:
    decisions = decide(survey(store, NOW), registered, NOW, keep_days)
    return {bytes.fromhex(d.entry.fingerprint.rstrip("0")).decode() for d in decisions if not d.keep}


def test_a_registered_version_keeps_all_it_was_made_of(store: Store) -> None:
    assert going(store, {fingerprint("ma"): "demo version 1"}) == {"nb", "pb", "tb", "mb"}
    assert going(store, {}) == {"raw", "na", "pa", "ta", "ma", "nb", "pb", "tb", "mb"}


def test_what_was_reused_lately_is_kept_with_all_it_was_made_of(store: Store) -> None:
    store.mark_used("pack", fingerprint("pb"))
    assert going(store, {}) == {"na", "pa", "ta", "ma", "tb", "mb"}
    assert going(store, {}, keep_days=200) == set()


def test_the_reason_is_said(store: Store) -> None:
    decisions = decide(survey(store, NOW), {fingerprint("ma"): "demo version 1"}, NOW, 30)
    why = {d.entry.manifest.step: d.why for d in decisions if d.keep and d.entry.manifest}
    assert why["merge"] == "demo version 1"
    assert why["train"] == f"made into merge {fingerprint('ma')[:12]}"
    assert {d.why for d in decisions if not d.keep} == {"not used for 100 days, and not registered"}


def test_removal_is_whole_and_spares_what_was_used_since(store: Store, tmp_path: Path) -> None:
    store.remember("recipe/pack", "pack", fingerprint("pb"))
    entries = {entry.fingerprint: entry for entry in survey(store, NOW)}
    store.mark_used("merge", fingerprint("mb"))
    assert not remove(store, entries[fingerprint("mb")])
    assert remove(store, entries[fingerprint("pb")])
    assert store.find("merge", fingerprint("mb")) is not None
    assert not (tmp_path / "store" / "pack" / fingerprint("pb")).exists()
    assert list((tmp_path / "store" / "latest" / "recipe").iterdir()) == []


def test_a_live_training_is_not_touched(store: Store, tmp_path: Path) -> None:
    work = store.work_in_progress("train", fingerprint("new"))
    (work / "checkpoint-3").mkdir(parents=True)
    staged = tmp_path / "store" / ".staging" / "train-1"
    staged.mkdir(parents=True)
    with store.training_lease(fingerprint("new"), print):
        age(work, 100)
        age(staged, 100)
        kept = [d for d in decide(survey(store, NOW), {}, NOW, 30) if d.keep]
        assert [d.entry.kind for d in kept] == [WORK, STAGED]
        assert kept[0].why.startswith("in use by process ")
        assert not remove(store, kept[0].entry)
    age(work, 100)
    gone = [d.entry for d in decide(survey(store, NOW), {}, NOW, 30) if not d.keep and d.entry.kind in (WORK, STAGED)]
    assert [remove(store, entry) for entry in gone] == [True, True]
    assert not work.exists()
    assert not staged.exists()


def test_leftovers_go_after_a_day_and_resumable_state_after_the_days_to_keep(store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "store"
    for place, days in {
        "pack/" + fingerprint("torn"): 2,
        "pack/" + fingerprint("half"): 0.5,
        ".staging/pack-1": 2,
        ".staging/pack-2": 0.5,
        f"train/{fingerprint('ta')}/checkpoints": 2,
        f"train/{fingerprint('resumable')}/checkpoints": 20,
    }.items():
        (folder / place / "checkpoint-1").mkdir(parents=True)
        (folder / place / "checkpoint-1" / "data").write_text("x")
        age(folder / place, days)
    kept = {fingerprint("ma"): "v", fingerprint("mb"): "v"}
    decisions = decide(survey(store, NOW), kept, NOW, 30)
    removed = {(d.entry.kind, Path(d.entry.place).relative_to(folder).as_posix()) for d in decisions if not d.keep}
    assert removed == {
        (TORN, "pack/" + fingerprint("torn")),
        (STAGED, ".staging/pack-1"),
        (WORK, f"train/{fingerprint('ta')}/checkpoints"),
    }
    assert {d.entry.fingerprint for d in decide(survey(store, NOW), kept, NOW, 10) if not d.keep} >= {
        fingerprint("resumable")
    }


def test_local_copies_of_an_object_store_go_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    store = Store(f"memory://{tmp_path.name}")
    publish(store, "pack", "p")
    copy = store.local(store.artifact("pack", fingerprint("p")))
    assert going(store, {}) == set()
    age(copy, 40)
    (entry,) = [d.entry for d in decide(survey(store, NOW), {}, NOW, 30) if not d.keep]
    assert (entry.kind, entry.size) == (COPY, 1)
    assert remove(store, entry)
    assert not copy.exists()
    assert store.find("pack", fingerprint("p")) is not None


@pytest.mark.parametrize("fault", ["missing", "5 bytes, not 2", "its bytes are not those that were written"])
def test_damage_is_named(store: Store, fault: str) -> None:
    entry = next(e for e in survey(store, NOW) if e.fingerprint == fingerprint("pa"))
    assert damage(store, entry) == []
    path = Path(entry.place, "data")
    path.unlink()
    if fault != "missing":
        path.write_text("pa..." if "5" in fault else "pb")
    assert damage(store, entry) == [f"{path}: {fault}"]


def test_publishing_holds_a_lease_that_gc_sees(tmp_path: Path) -> None:
    store = Store(f"memory://{tmp_path.name}")
    address = store.address("pack", fingerprint("p"))
    store.files.write(f"{address}/data", b"half")
    with hold(store.files, f"{address}/publishing", "publishing"):
        (entry,) = [e for e in survey(store, NOW) if e.kind == TORN]
        assert entry.holder
    assert isinstance(entry, Entry)
    assert entry.kind != ARTIFACT
