"""The artifact store: `<store>/<step>/<fingerprint>/`, any fsspec URL (DESIGN 3).

In: a folder that a step has filled. Out: the same files under their address, `manifest.json` last. A folder
without a manifest is not an artifact. Of two writers the first manifest wins and the second adopts it.
"""

import json
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import fsspec

from sft_core.artifacts import KIND_OF_STEP, MANIFEST, Artifact, Manifest, StoredFile
from sft_core.errors import StoreError
from sft_core.fingerprint import hash_file, hash_text
from sft_core.shards import Earlier, EarlierFolder, EarlierRemote, NothingEarlier

WORK_IN_PROGRESS = "checkpoints"
"""Folder inside a train artifact's address that holds resumable state and is no part of the artifact."""
LATEST = "latest"
"""Folder of hints: which artifact each step of each recipe wrote last."""


class Store:
    """One store. `url` is a folder or an fsspec URL; a relative folder is taken from the current directory."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        try:
            self._fs, root = fsspec.core.url_to_fs(self.url)
        except (ValueError, ImportError) as error:
            raise StoreError(f"store {url!r}: {error}") from None
        self._root = str(root)
        self.is_local = "file" in _protocols(self._fs)
        self._verified: set[str] = set()

    def address(self, step: str, fingerprint: str) -> str:
        """Path of an artifact's folder on the store's file system."""
        return f"{self._root}/{step}/{fingerprint}"

    def artifact(self, step: str, fingerprint: str) -> Artifact:
        """The reference to what `step` writes (or will write) under `fingerprint`."""
        return Artifact(kind=KIND_OF_STEP[step], uri=f"{self.url}/{step}/{fingerprint}", fingerprint=fingerprint)

    def read_manifest(self, step: str, fingerprint: str) -> Manifest | None:
        """The manifest, or None where there is no complete artifact."""
        path = f"{self.address(step, fingerprint)}/{MANIFEST}"
        try:
            text = self._fs.cat_file(path)
        except FileNotFoundError:
            return None
        try:
            return Manifest.from_dict(json.loads(text))
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{path}: not a manifest ({error}); delete that folder and run again") from None

    def find(self, step: str, fingerprint: str) -> Manifest | None:
        """The manifest if the artifact is complete: every file there, of its size. A torn one counts as absent."""
        manifest = self.read_manifest(step, fingerprint)
        if manifest is None:
            return None
        address = self.address(step, fingerprint)
        sizes = {name: self._size(f"{address}/{name}") for name in manifest.files}
        complete = all(sizes[name] == entry.size for name, entry in manifest.files.items())
        return manifest if complete else None

    def manifests(self, step: str) -> list[Manifest]:
        """All manifests of a step, oldest first."""
        try:
            folders = self._fs.ls(f"{self._root}/{step}", detail=False)
        except FileNotFoundError:
            return []
        found = (self.read_manifest(step, folder.rstrip("/").rsplit("/", 1)[-1]) for folder in folders)
        return sorted((m for m in found if m is not None), key=lambda m: m.started)

    def remember(self, name: str, step: str, fingerprint: str) -> None:
        """Note that `name` (a recipe and a step's key) was last built as this: a hint, for `earlier` alone."""
        path = f"{self._root}/{LATEST}/{name}"
        self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        self._fs.pipe_file(path, f"{step}/{fingerprint}\n".encode())

    def earlier(self, name: str) -> Earlier:
        """Shards of what `name` was last built as, where that is complete."""
        try:
            step, _, fingerprint = self._fs.cat_file(f"{self._root}/{LATEST}/{name}").decode().strip().partition("/")
        except FileNotFoundError:
            return NothingEarlier()
        if self.find(step, fingerprint) is None:
            return NothingEarlier()
        address = self.address(step, fingerprint)
        try:
            return EarlierFolder(Path(address)) if self.is_local else EarlierRemote(self._fs, address)
        except (OSError, ValueError, TypeError, KeyError):  # no list of shards, or not one of this version
            return NothingEarlier()

    @contextmanager
    def staging(self, step: str) -> Iterator[Path]:
        """A local folder to fill before `publish`, on the store's own disk where it has one; gone afterwards."""
        if self.is_local:
            folder = Path(self._root) / ".staging" / f"{step}-{uuid.uuid4().hex}"
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
        return Path(tempfile.gettempdir()) / "sft-work" / fingerprint

    def publish(self, folder: Path, manifest: Manifest) -> Manifest:
        """Put `folder`'s files under their address and the manifest last; return the manifest that won."""
        address = self.address(manifest.step, manifest.fingerprint)
        torn = self.read_manifest(manifest.step, manifest.fingerprint)
        if torn is not None:
            if self.find(manifest.step, manifest.fingerprint) is not None:
                return torn
            self._fs.rm_file(f"{address}/{MANIFEST}")
        if self.is_local and not Path(address).exists():
            return self._publish_whole(folder, Path(address), manifest)
        for name in manifest.files:
            self._put(folder / name, f"{address}/{name}")
        self._put_manifest(f"{address}/{MANIFEST}", manifest)
        winner = self.read_manifest(manifest.step, manifest.fingerprint)
        assert winner is not None, "a manifest was just written here"
        return winner

    def _publish_whole(self, folder: Path, address: Path, manifest: Manifest) -> Manifest:
        """The usual case on a disk: one rename makes everything visible at once."""
        (folder / MANIFEST).write_text(_manifest_text(manifest), "utf-8")
        address.parent.mkdir(parents=True, exist_ok=True)
        try:
            folder.rename(address)
        except OSError:
            if self.find(manifest.step, manifest.fingerprint) is None:
                raise
        winner = self.read_manifest(manifest.step, manifest.fingerprint)
        assert winner is not None, "a manifest was just moved here"
        return winner

    def local(self, artifact: Artifact) -> Path:
        """A local folder with the artifact's files, each checked against its SHA-256 once a process."""
        step = _step_of(artifact.kind)
        manifest = self.find(step, artifact.fingerprint)
        if manifest is None:
            raise StoreError(
                f"{artifact.kind} {artifact.fingerprint[:12]} is not in the store {self.url}; run its step"
            )
        folder = Path(self.address(step, artifact.fingerprint)) if self.is_local else self._download(manifest)
        if artifact.fingerprint not in self._verified:
            verify_files(folder, manifest)
            self._verified.add(artifact.fingerprint)
        return folder

    def _download(self, manifest: Manifest) -> Path:
        cache = Path(tempfile.gettempdir()) / "sft-store-cache" / hash_text(self.url)[:16] / manifest.fingerprint
        for name, entry in manifest.files.items():
            target = cache / name
            if target.is_file() and hash_file(target) == entry.sha256:
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            part = target.with_name(f"{target.name}.{uuid.uuid4().hex}")
            self._fs.get_file(f"{self.address(manifest.step, manifest.fingerprint)}/{name}", str(part))
            part.replace(target)
        return cache

    def _size(self, path: str) -> int | None:
        try:
            return int(self._fs.info(path)["size"])
        except FileNotFoundError:
            return None

    def _put(self, source: Path, target: str) -> None:
        if self.is_local:
            Path(target).parent.mkdir(parents=True, exist_ok=True)
            source.replace(target)
        else:
            self._fs.put_file(str(source), target)

    def _put_manifest(self, path: str, manifest: Manifest) -> None:
        text = _manifest_text(manifest)
        if not self.is_local:
            self._fs.pipe_file(path, text.encode())
            return
        part = Path(f"{path}.{uuid.uuid4().hex}")
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, "utf-8")
        with suppress(FileExistsError):  # another writer was first: its manifest stands
            Path(path).hardlink_to(part)
        part.unlink()


def _manifest_text(manifest: Manifest) -> str:
    return json.dumps(manifest.as_dict(), indent=1, ensure_ascii=False) + "\n"


def list_files(folder: Path) -> dict[str, StoredFile]:
    """Every file below `folder` by relative path, with size and SHA-256, as a manifest lists them."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): StoredFile(p.stat().st_size, hash_file(p)) for p in paths}


def verify_files(folder: Path, manifest: Manifest) -> None:
    """StoreError naming the first file that is missing or whose bytes are not those of the manifest."""
    for name, entry in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise StoreError(f"{path}: missing; delete {folder} and run again to rebuild it")
        if path.stat().st_size != entry.size or hash_file(path) != entry.sha256:
            raise StoreError(f"{path}: its bytes are not those that were written; delete {folder} and run again")


def _step_of(kind: str) -> str:
    return next(step for step, name in KIND_OF_STEP.items() if name == kind)


def _protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)
