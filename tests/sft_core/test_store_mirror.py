"""Checkpoints of an object store: another machine fetches the newest whole one, byte for byte what was saved."""

import json
import threading
import time
from pathlib import Path

import pytest

from sft_core.errors import StoreError
from sft_core.lease import Holder, Lease
from sft_core.store_cache import list_files
from sft_core.store_files import StoreFiles
from sft_core.train import mirror as module
from sft_core.train.checkpoints import COMPLETE, Counts, keep_newest, mark_complete, newest_complete
from sft_core.train.mirror import MARK, Mirror, mirroring

LONG = 60.0


@pytest.fixture
def files(tmp_path: Path) -> StoreFiles:
    return StoreFiles(f"memory://{tmp_path.name}")


@pytest.fixture
def lease(files: StoreFiles) -> Lease:
    return Lease(files, f"{files.root}/train/ab/checkpoints/lease", 1, Holder(seconds=60.0), "training ab")


def mirror_in(files: StoreFiles, work: Path) -> Mirror:
    return Mirror(files, f"{files.root}/train/ab/checkpoints", work)


def save(work: Path, step: int, best: int | None = None) -> Path:
    """What the Trainer leaves after an optimizer step."""
    folder = work / f"checkpoint-{step}"
    (folder / f"global_step{step}").mkdir(parents=True)
    (folder / f"global_step{step}" / "state.bin").write_bytes(bytes(range(step)) * 1000)
    history = [{"step": best, "eval_loss": 1.0}] if best is not None else []
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    with (work / "metrics.jsonl").open("a") as file:
        file.write(f'{{"optimizer_step": {step}}}\n')
    mark_complete(folder, 1, Counts(tokens=step))
    return folder


def there(files: StoreFiles) -> list[str]:
    names = files.walk(f"{files.root}/train/ab/checkpoints")
    return sorted({name.partition("/")[0] for name in names if name.startswith("checkpoint-")})


def test_another_machine_fetches_the_newest_with_its_logs(files: StoreFiles, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    sender = mirror_in(files, one)
    for step in (3, 5, 12):
        save(one, step)
    sender.send()
    assert there(files) == ["checkpoint-12", "checkpoint-3", "checkpoint-5"]
    assert mirror_in(files, two).fetch() == "checkpoint-12"
    assert newest_complete(two) == two / "checkpoint-12"
    assert list_files(two / "checkpoint-12") == list_files(one / "checkpoint-12")
    assert (two / "metrics.jsonl").read_bytes() == (one / "metrics.jsonl").read_bytes()
    assert mirror_in(files, two).fetch() is None  # it has it now


def test_the_best_checkpoint_comes_along(files: StoreFiles, tmp_path: Path) -> None:
    for step, best in ((2, 2), (4, 2), (6, 2)):
        save(tmp_path / "one", step, best)
    mirror_in(files, tmp_path / "one").send()
    mirror_in(files, tmp_path / "two").fetch()
    assert sorted(path.name for path in (tmp_path / "two").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-6"]


def test_what_the_trainer_deletes_goes_there_too_and_not_before_the_newer_one_is_there(
    files: StoreFiles, tmp_path: Path
) -> None:
    sender = mirror_in(files, tmp_path)
    save(tmp_path, 1)
    save(tmp_path, 2)
    sender.send()
    save(tmp_path, 3)
    keep_newest(tmp_path, 1)
    (tmp_path / "checkpoint-3" / COMPLETE).rename(tmp_path / "mark")  # not complete yet
    sender.send()
    assert there(files) == ["checkpoint-1", "checkpoint-2"]
    (tmp_path / "mark").rename(tmp_path / "checkpoint-3" / COMPLETE)
    sender.send()
    assert there(files) == ["checkpoint-3"]


@pytest.mark.parametrize("fault", ["no mark", "half a mark", "missing", "shorter", "other bytes"])
def test_a_torn_checkpoint_is_passed_over(files: StoreFiles, tmp_path: Path, fault: str) -> None:
    save(tmp_path / "one", 1)
    save(tmp_path / "one", 2)
    mirror_in(files, tmp_path / "one").send()
    newest = f"{files.root}/train/ab/checkpoints/checkpoint-2/one"
    state = f"{newest}/global_step2/state.bin"
    good = files.cat_file(state)
    {
        "no mark": lambda: files.remove(f"{newest}/{MARK}"),
        "half a mark": lambda: files.write(f"{newest}/{MARK}", b'{"global_step2/state.bin": {"si'),
        "missing": lambda: files.remove(state),
        "shorter": lambda: files.write(state, good[:-1]),
        "other bytes": lambda: files.write(state, b"x" + good[1:]),
    }[fault]()
    lines: list[str] = []
    assert mirror_in(files, tmp_path / "two").fetch(lines.append) == "checkpoint-1"
    passed = "note: checkpoint-2 in memory:///train/ab/checkpoints is not what was sent; passed over for the one before"
    assert lines == ([] if fault == "no mark" else [passed.replace("///", f"//{files.root}/")])
    assert [path.name for path in (tmp_path / "two").iterdir() if path.is_dir()] == ["checkpoint-1"]


def test_a_newer_local_checkpoint_is_kept(files: StoreFiles, tmp_path: Path) -> None:
    save(tmp_path / "one", 1)
    mirror_in(files, tmp_path / "one").send()
    save(tmp_path / "two", 2)
    assert mirror_in(files, tmp_path / "two").fetch() is None
    assert newest_complete(tmp_path / "two") == tmp_path / "two" / "checkpoint-2"


def test_checkpoints_are_sent_while_training_runs(
    files: StoreFiles, lease: Lease, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.05)
    with mirroring(mirror_in(files, tmp_path), lease, lambda _: None):
        save(tmp_path, 1)
        deadline = time.monotonic() + LONG
        while not there(files) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert there(files) == ["checkpoint-1"]


def test_a_stopped_training_sends_its_last_checkpoint(files: StoreFiles, lease: Lease, tmp_path: Path) -> None:
    def stop() -> None:
        with mirroring(mirror_in(files, tmp_path), lease, lambda _: None):
            save(tmp_path, 7)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    assert mirror_in(files, tmp_path / "two").fetch() == "checkpoint-7"


def test_a_holder_that_lost_the_lease_neither_deletes_nor_overwrites_what_the_next_one_sent(
    files: StoreFiles, tmp_path: Path
) -> None:
    """Both think that they hold it: no look at the lease is in between."""
    first, second = mirror_in(files, tmp_path / "00000001-aaaaaaaa"), mirror_in(files, tmp_path / "00000002-bbbbbbbb")
    save(tmp_path / "00000001-aaaaaaaa", 1)
    first.send()
    assert second.fetch() == "checkpoint-1"
    for step in (2, 3):
        save(tmp_path / "00000002-bbbbbbbb", step)
    keep_newest(tmp_path / "00000002-bbbbbbbb", 1)
    second.send()
    newest = f"{files.root}/train/ab/checkpoints/checkpoint-3"
    sent = {name: files.cat_file(f"{newest}/{name}") for name in files.walk(newest)}
    for step in (2, 3):  # the same steps, other bytes
        save(tmp_path / "00000001-aaaaaaaa", step, best=1)
    keep_newest(tmp_path / "00000001-aaaaaaaa", 1)
    first.send()
    kept = {name: data for name in files.walk(newest) for data in [files.cat_file(f"{newest}/{name}")] if name in sent}
    assert kept == sent
    assert mirror_in(files, tmp_path / "00000003-cccccccc").fetch() == "checkpoint-3"
    assert list_files(tmp_path / "00000003-cccccccc" / "checkpoint-3") == list_files(
        tmp_path / "00000002-bbbbbbbb" / "checkpoint-3"
    )


def test_a_mirror_cannot_name_files_outside(files: StoreFiles, tmp_path: Path) -> None:
    save(tmp_path / "one", 1)
    mirror_in(files, tmp_path / "one").send()
    there = f"{files.root}/train/ab/checkpoints/checkpoint-1/one"
    mark = json.loads(files.cat_file(f"{there}/{MARK}"))
    mark["../../../planted"] = mark["trainer_state.json"]
    files.write(f"{there}/{MARK}", json.dumps(mark).encode())
    files.write(f"{files.root}/train/ab/planted", b"")
    assert mirror_in(files, tmp_path / "deep" / "two").fetch(lambda _: None) is None
    assert not list(tmp_path.rglob("planted"))


def test_a_store_that_does_not_answer_is_a_note_and_the_training_goes_on(
    files: StoreFiles, lease: Lease, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.05)
    mirror, lines, asked = mirror_in(files, tmp_path), list[str](), threading.Event()

    class Away(StoreFiles):
        def put_file(self, source: Path, path: str) -> None:
            asked.set()
            raise StoreError("the store cannot be reached")

    mirror._files = Away(files.url)
    with mirroring(mirror, lease, lines.append) as hear:
        save(tmp_path, 1)
        assert asked.wait(LONG)
        time.sleep(0.2)
        hear("step 2")
    assert lines[0] == "note: a checkpoint was not mirrored, tried again: the store cannot be reached"
    assert "step 2" in lines
