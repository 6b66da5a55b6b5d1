"""What lies in a store, and in this machine's copies of it: one entry an artifact, a leftover, a copy.

In: a store. Out: `Entry`s with size and last use, and what is damaged. Reads listings and manifests; `damage` reads all
bytes, in parts.
"""

import shutil
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from sft_core.artifacts import KIND_OF_STEP, MANIFEST, Manifest
from sft_core.lease import live_holder
from sft_core.store import PUBLISHING, STAGING, TRAINING, USED, WORK_IN_PROGRESS, Store
from sft_core.store_files import Found

ARTIFACT, TORN, WORK, STAGED, COPY = "artifact", "torn", "work", "staging", "local copy"
TOUCHED = (MANIFEST, USED)
"""Files whose times say when an artifact was built or reused last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One thing that takes room. `place` is its path; a live lease's holder is at work on it."""

    kind: str
    place: str
    step: str
    fingerprint: str
    size: int
    last_used: datetime
    manifest: Manifest | None = None
    holder: str = ""


def survey(store: Store, now: datetime) -> list[Entry]:
    """Everything, the store's in the order of the steps, then this machine's."""
    entries: list[Entry] = []
    for step in KIND_OF_STEP:
        folders: dict[str, dict[str, Found]] = defaultdict(dict)
        for name, found in store.files.walk(f"{store.files.root}/{step}").items():
            fingerprint, _, file = name.partition("/")
            folders[fingerprint][file] = found
        for fingerprint, files in sorted(folders.items()):
            entries += _entries(store, step, fingerprint, files, now)
    return entries + list(_staging(store)) + list(_local(store))


def damage(store: Store, entry: Entry) -> list[str]:
    """What is wrong with an artifact's files, a line each; empty if every byte is as it was written."""
    if entry.manifest is None:
        return [f"{store.files.show(entry.place)}: no manifest, or not one that can be read"]
    lines = []
    for name, file in entry.manifest.files.items():
        path = f"{entry.place}/{name}"
        size = store.files.size(path)
        if size is None:
            lines.append(f"{store.files.show(path)}: missing")
        elif size != file.size:
            lines.append(f"{store.files.show(path)}: {size:,} bytes, not {file.size:,}")
        elif store.files.sha256(path) != file.sha256:
            lines.append(f"{store.files.show(path)}: its bytes are not those that were written")
    return lines


def remove(store: Store, entry: Entry) -> bool:
    """Remove what an entry stands for; False if it was used or changed since it was surveyed."""
    if entry.kind in (STAGED, COPY):
        shutil.rmtree(entry.place, ignore_errors=True)
        return True
    folder = store.address(entry.step, entry.fingerprint)
    files = store.files.walk(folder)
    now = [e for e in _entries(store, entry.step, entry.fingerprint, files, datetime.now(UTC)) if e.kind == entry.kind]
    if not now or now[0].holder or now[0].last_used > entry.last_used:
        return False
    if entry.kind == ARTIFACT:
        store.files.remove(f"{folder}/{MANIFEST}")  # first: what is half removed is absent
        store.forget(entry.step, entry.fingerprint)
    store.files.remove_tree(entry.place)
    return True


def _entries(store: Store, step: str, fingerprint: str, files: dict[str, Found], now: datetime) -> Iterator[Entry]:
    """The artifact, whole or torn, and the resumable state beside it."""
    address = store.address(step, fingerprint)
    of_work = {name: file for name, file in files.items() if name.startswith(f"{WORK_IN_PROGRESS}/")}
    own = {name: file for name, file in files.items() if name not in of_work}
    if own:
        manifest = store.read_manifest(step, fingerprint) if MANIFEST in own else None
        times = [own[name].modified for name in TOUCHED if name in own] if manifest else []
        yield Entry(
            kind=ARTIFACT if manifest is not None else TORN,
            place=address,
            step=step,
            fingerprint=fingerprint,
            size=sum(file.size for file in own.values()),
            last_used=max(times or [file.modified for file in own.values()]),
            manifest=manifest,
            holder=_holder(store, f"{address}/{PUBLISHING}", own, now) or _training(store, address, of_work, now),
        )
    if of_work:
        yield Entry(
            kind=WORK,
            place=f"{address}/{WORK_IN_PROGRESS}",
            step=step,
            fingerprint=fingerprint,
            size=sum(file.size for file in of_work.values()),
            last_used=max(file.modified for file in of_work.values()),
            holder=_training(store, address, of_work, now),
        )


def _training(store: Store, address: str, files: dict[str, Found], now: datetime) -> str:
    return _holder(store, f"{address}/{WORK_IN_PROGRESS}/{TRAINING}", files, now)


def _holder(store: Store, lease: str, files: dict[str, Found], now: datetime) -> str:
    below = lease.rpartition("/")[2]
    if not any(f"{below}/" in name for name in files):
        return ""
    holder = live_holder(store.files, lease, now)
    return str(holder) if holder is not None else ""


def _staging(store: Store) -> Iterator[Entry]:
    if store.is_local:
        for folder in sorted(Path(store.files.root, STAGING).glob("*")):
            yield _folder(STAGED, folder, folder.name.partition("-")[0], "")


def _local(store: Store) -> Iterator[Entry]:
    if not store.is_local:
        for folder in sorted(store.cache.root.glob("*")):
            yield _folder(COPY, folder, "", folder.name)
        for folder in sorted(store.work_in_progress("train", "any").parent.glob("*")):
            yield _folder(COPY, folder, "train", folder.name)


def _folder(kind: str, folder: Path, step: str, fingerprint: str) -> Entry:
    paths = [folder, *(path for path in folder.rglob("*") if not path.is_symlink())]
    stats = [path.stat() for path in paths if path.exists()]
    return Entry(
        kind=kind,
        place=str(folder),
        step=step,
        fingerprint=fingerprint,
        size=sum(path.stat().st_size for path in paths if path.is_file()),
        last_used=datetime.fromtimestamp(max((stat.st_mtime for stat in stats), default=0.0), UTC),
    )
