"""Copies of an object store's artifacts on this machine, each file checked against its SHA-256.

In: a manifest and its address. Out: a local folder with the artifact's files. A file that is not what was written is a
StoreError and is not kept.
"""

import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sft_core.artifacts import Manifest, StoredFile
from sft_core.errors import StoreError
from sft_core.fingerprint import hash_file, hash_text
from sft_core.private import private_folder
from sft_core.store_files import StoreFiles

CACHE = "sft-store-cache"
"""Folder in the temporary folder, this user's alone."""
HASHES_AT_ONCE = 4
"""Files; hashlib holds no lock of Python's."""
ALTERED = "its bytes are not those that were written"


class StoreCache:
    """Copies of one store's artifacts, by fingerprint. Processes may share it: a file appears by a rename."""

    def __init__(self, files: StoreFiles) -> None:
        self._files = files
        self.key = hash_text(files.url)[:16]
        self._verified: set[str] = set()

    @property
    def root(self) -> Path:
        """This store's folder."""
        return private_folder(CACHE) / self.key

    def folder(self, manifest: Manifest, address: str) -> Path:
        """The artifact's files, those that lack fetched now; all checked once a process."""
        folder = self.root / manifest.fingerprint
        if manifest.fingerprint in self._verified:
            return folder
        for name, entry in manifest.files.items():
            target = folder / name
            if not _is(target, entry):
                self._fetch(f"{address}/{name}", target, entry)
        folder.mkdir(parents=True, exist_ok=True)
        folder.touch()  # used now
        self._verified.add(manifest.fingerprint)
        return folder

    def _fetch(self, path: str, target: Path, entry: StoredFile) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f"{target.name}.{uuid.uuid4().hex}")
        try:
            self._files.get_file(path, str(part))
            if not _is(part, entry):
                raise StoreError(f"{self._files.show(path)}: {ALTERED}; delete its folder and run again to rebuild it")
            part.replace(target)
        except FileNotFoundError:
            raise StoreError(f"{self._files.show(path)}: removed while it was read; run again to rebuild it") from None
        finally:
            part.unlink(missing_ok=True)


def _is(path: Path, entry: StoredFile) -> bool:
    return path.is_file() and path.stat().st_size == entry.size and hash_file(path) == entry.sha256


def list_files(folder: Path) -> dict[str, StoredFile]:
    """Every file below `folder` by relative path, with size and SHA-256, as a manifest lists them."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    with ThreadPoolExecutor(HASHES_AT_ONCE) as threads:
        hashes = threads.map(hash_file, paths)
        return {
            path.relative_to(folder).as_posix(): StoredFile(path.stat().st_size, sha256)
            for path, sha256 in zip(paths, hashes, strict=True)
        }


def verify_files(folder: Path, manifest: Manifest) -> None:
    """StoreError naming the first file that is missing or whose bytes are not those of the manifest."""
    for name, entry in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise StoreError(f"{path}: missing; delete {folder} and run again to rebuild it")
        if path.stat().st_size != entry.size or hash_file(path) != entry.sha256:
            raise StoreError(f"{path}: {ALTERED}; delete {folder} and run again")
