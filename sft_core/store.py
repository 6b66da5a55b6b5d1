"""The artifact store: `<store>/<step>/<fingerprint>/`, any fsspec URL (DESIGN 3).

In: a folder that a step has filled. Out: the same files under their address, `manifest.json` last. A folder
without a manifest is not an artifact. Of two writers the first manifest wins and the second adopts it.
"""

import json
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sft_core.artifacts import KIND_OF_STEP, MANIFEST, Artifact, Manifest
from sft_core.errors import StoreError
from sft_core.lease import Lease, hold
from sft_core.private import private_folder
from sft_core.shards import SHARDS, Earlier, EarlierFolder, EarlierRemote, NothingEarlier
from sft_core.store_cache import StoreCache, list_files, verify_files
from sft_core.store_files import StoreFiles, sync

__all__ = ["Store", "list_files", "verify_files"]

WORK_IN_PROGRESS = "checkpoints"
"""Folder inside a train artifact's address that holds resumable state and is no part of the artifact."""
LATEST = "latest"
"""Folder of hints: which artifact each step of each recipe wrote last."""
STAGING = ".staging"
"""Folder of a disk's store where artifacts are filled."""
USED = "used"
"""Empty file beside a manifest in an object store: its time says when the artifact was last built or reused. On a disk
the manifest's own time does."""
PUBLISHING, TRAINING = "publishing", "lease"
"""Folders of leases: below an artifact's address, and below its work in progress."""
WORK = "sft-work"
"""Folder in this machine's temporary folder, this user's alone: resumable state of artifacts of object stores."""


class Store:
    """One store. `url` is a folder or an fsspec URL; a relative folder is taken from the current directory."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.files = StoreFiles(self.url)
        self.is_local = self.files.is_local
        self.cache = StoreCache(self.files)
        self._verified: set[str] = set()

    def address(self, step: str, fingerprint: str) -> str:
        """Path of an artifact's folder on the store's file system."""
        return f"{self.files.root}/{step}/{fingerprint}"

    def artifact(self, step: str, fingerprint: str) -> Artifact:
        """The reference to what `step` writes (or will write) under `fingerprint`."""
        return Artifact(kind=KIND_OF_STEP[step], uri=f"{self.url}/{step}/{fingerprint}", fingerprint=fingerprint)

    def read_manifest(self, step: str, fingerprint: str) -> Manifest | None:
        """The manifest, or None where there is no complete artifact: none, a torn one, or one that is not of this
        address."""
        path = f"{self.address(step, fingerprint)}/{MANIFEST}"
        try:
            manifest = Manifest.from_dict(json.loads(self.files.cat_file(path)))
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError, RecursionError):
            return None
        named = (manifest.step, manifest.fingerprint, manifest.kind)
        return manifest if named == (step, fingerprint, KIND_OF_STEP.get(step)) else None

    def find(self, step: str, fingerprint: str) -> Manifest | None:
        """The manifest if the artifact is complete: every file there, of its size. A torn one counts as absent."""
        manifest = self.read_manifest(step, fingerprint)
        if manifest is None:
            return None
        address = self.address(step, fingerprint)
        if self.is_local:
            sizes = {name: self.files.size(f"{address}/{name}") for name in manifest.files}
        else:  # one listing in place of a request a file
            sizes = {name: found.size for name, found in self.files.walk(address).items()}
        complete = all(sizes.get(name) == entry.size for name, entry in manifest.files.items())
        return manifest if complete else None

    def manifests(self, step: str) -> list[Manifest]:
        """All manifests of a step, oldest first."""
        names = self.files.names(f"{self.files.root}/{step}")
        found = (self.read_manifest(step, name) for name in names)
        return sorted((m for m in found if m is not None), key=lambda m: m.started)

    def mark_used(self, step: str, fingerprint: str) -> None:
        """Note that a run needs this artifact now: `sft store gc` counts its days from here."""
        address = self.address(step, fingerprint)
        if self.is_local:
            Path(address, MANIFEST).touch()
        else:
            self.files.write(f"{address}/{USED}", b"")

    def remember(self, name: str, step: str, fingerprint: str) -> None:
        """Note that `name` (a recipe and a step's key) was last built as this: a hint, for `earlier` alone."""
        self.files.write(f"{self.files.root}/{LATEST}/{name}", f"{step}/{fingerprint}\n".encode())

    def forget(self, step: str, fingerprint: str) -> None:
        """Remove the hints that name this artifact."""
        for path in self.files.walk(f"{self.files.root}/{LATEST}"):
            full = f"{self.files.root}/{LATEST}/{path}"
            if self.files.cat_file(full).decode().strip() == f"{step}/{fingerprint}":
                self.files.remove(full)

    def earlier(self, name: str) -> Earlier:
        """Shards of what `name` was last built as, where that is complete."""
        try:
            hint = self.files.cat_file(f"{self.files.root}/{LATEST}/{name}").decode()
        except (FileNotFoundError, UnicodeDecodeError):
            return NothingEarlier()
        step, _, fingerprint = hint.strip().partition("/")
        manifest = self.find(step, fingerprint)
        if manifest is None or SHARDS not in manifest.files:
            return NothingEarlier()
        address = self.address(step, fingerprint)
        try:
            if self.files.sha256(f"{address}/{SHARDS}") != manifest.files[SHARDS].sha256:
                return NothingEarlier()
            return EarlierFolder(Path(address)) if self.is_local else EarlierRemote(self.files, address)
        except (OSError, StoreError):  # not a list of shards of this version
            return NothingEarlier()

    @contextmanager
    def staging(self, step: str) -> Iterator[Path]:
        """A local folder to fill before `publish`, on the store's own disk where it has one; gone afterwards."""
        if self.is_local:
            folder = Path(self.files.root) / STAGING / f"{step}-{uuid.uuid4().hex}"
            folder.mkdir(parents=True)
        else:
            folder = Path(tempfile.mkdtemp(prefix=f"sft-{step}-"))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def work_in_progress(self, step: str, fingerprint: str) -> Path:
        """Local folder for resumable state: beside the artifact if the store is a disk, else a temporary one."""
        if self.is_local:
            return Path(self.address(step, fingerprint)) / WORK_IN_PROGRESS
        return private_folder(WORK) / self.cache.key / fingerprint

    def drop_work(self, step: str, fingerprint: str) -> None:
        """Remove resumable state, here and in the store; the lease stays, which is the caller's."""
        if not self.is_local:
            shutil.rmtree(self.work_in_progress(step, fingerprint), ignore_errors=True)
        mirror = self.mirror(step, fingerprint)
        for name in self.files.names(mirror):
            if name != TRAINING:
                self.files.remove_tree(f"{mirror}/{name}")

    def mirror(self, step: str, fingerprint: str) -> str:
        """Where resumable state lies in the store, for other machines."""
        return f"{self.address(step, fingerprint)}/{WORK_IN_PROGRESS}"

    @contextmanager
    def training_lease(self, fingerprint: str, on_line: Callable[[str], None]) -> Iterator[Lease]:
        """Keeps a second trainer off a fingerprint: it waits."""
        folder = f"{self.mirror('train', fingerprint)}/{TRAINING}"
        with hold(self.files, folder, f"training {fingerprint[:12]} in {self.url}", on_line) as lease:
            yield lease
        if self.is_local:
            with suppress(OSError):  # not empty: the training goes on another time
                Path(folder).rmdir()
                Path(folder).parent.rmdir()

    def publish(self, folder: Path, manifest: Manifest) -> Manifest:
        """Put `folder`'s files under their address and the manifest last; return the manifest that won."""
        address = self.address(manifest.step, manifest.fingerprint)
        if self.is_local and _renamed(folder, Path(address), manifest):
            return manifest
        what = f"publishing {manifest.step} {manifest.fingerprint[:12]} in {self.url}"
        with hold(self.files, f"{address}/{PUBLISHING}", what):  # two would write over each other's files
            winner = self._publish_files(folder, manifest)
        self.files.remove_tree(f"{address}/{PUBLISHING}")
        return winner

    def _publish_files(self, folder: Path, manifest: Manifest) -> Manifest:
        """File by file, where the address is taken (by the state of a training, or by a torn artifact)."""
        address = self.address(manifest.step, manifest.fingerprint)
        winner = self.find(manifest.step, manifest.fingerprint)
        if winner is not None:
            return winner
        self.files.remove(f"{address}/{MANIFEST}")  # torn, or it names files that are not there
        for name in manifest.files:
            self.files.put_file(folder / name, f"{address}/{name}")
        if self.files.create(f"{address}/{MANIFEST}", _manifest_text(manifest).encode()):
            return manifest
        winner = self.read_manifest(manifest.step, manifest.fingerprint)
        assert winner is not None, "another writer's manifest was there"
        return winner

    def local(self, artifact: Artifact) -> Path:
        """A local folder with the artifact's files, each checked against its SHA-256 once a process."""
        step = _step_of(artifact.kind)
        manifest = self.find(step, artifact.fingerprint)
        if manifest is None:
            raise StoreError(
                f"{artifact.kind} {artifact.fingerprint[:12]} is not in the store {self.url}; run its step"
            )
        if not self.is_local:
            return self.cache.folder(manifest, self.address(step, artifact.fingerprint))
        folder = Path(self.address(step, artifact.fingerprint))
        if artifact.fingerprint not in self._verified:
            verify_files(folder, manifest)
            self._verified.add(artifact.fingerprint)
        return folder


def _renamed(folder: Path, address: Path, manifest: Manifest) -> bool:
    """The usual case on a disk: one rename makes everything visible at once, when all of it is on the disk. False where
    something lies there already."""
    (folder / MANIFEST).write_text(_manifest_text(manifest), "utf-8")
    for name in (*manifest.files, MANIFEST):
        sync(folder / name)
    address.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.rename(address)
    except OSError:
        if not address.exists():
            raise
        return False
    sync(address.parent)
    return True


def _manifest_text(manifest: Manifest) -> str:
    return json.dumps(manifest.as_dict(), indent=1, ensure_ascii=False) + "\n"


def _step_of(kind: str) -> str:
    return next(step for step, name in KIND_OF_STEP.items() if name == kind)
