"""The files of a store: a disk's or an object store's, behind the few operations that the project needs.

In: a URL. Out: bytes, sizes, names. Every fault of the far side is one `StoreError` that says what to do; what may
pass (a server that restarts, throttling) is tried again. Nothing is listed from a cache: another worker's writes are
seen at once. Files are sent and fetched in parts, never whole in memory.
"""

import errno
import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from sft_core.errors import StoreError
from sft_core.store_faults import code_of, may_pass, words_of

PART_BYTES = 16 * 2**20
PARTS_AT_ONCE = 4
"""A transfer holds at most PARTS_AT_ONCE parts of PART_BYTES in memory."""
WAITS = (2.0, 10.0, 30.0)
"""Seconds between tries of a request to a store that has answered before. Each try is itself several (botocore, s3fs):
a store that is away for a minute is waited for."""
SETTLE_SECONDS = 1.0
"""Where the far side cannot create a file exclusively: how long until what was written is read back."""
Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Found:
    """A file of a listing: size in bytes, time of the last change."""

    size: int
    modified: datetime


class StoreFiles:
    """Files below `root`. Paths are those of the fsspec file system, without the protocol. FileNotFoundError and
    FileExistsError are the only faults beside StoreError; a local disk's own errors come as they are."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        options: dict[str, Any] = {"use_listings_cache": False}
        if fsspec.utils.get_protocol(self.url) in ("s3", "s3a"):
            options |= {"max_concurrency": PARTS_AT_ONCE, "default_block_size": PART_BYTES}
        try:
            self.fs, root = fsspec.core.url_to_fs(self.url, **options)
        except (ValueError, ImportError) as error:
            extra = "; pip install 'sft-flows[s3]'" if self.url.startswith("s3") else ""
            raise StoreError(f"store {url!r}: {error}{extra}") from None
        self.root = str(root)
        protocols = (self.fs.protocol,) if isinstance(self.fs.protocol, str) else tuple(self.fs.protocol)
        self.is_local = "file" in protocols
        self._chunked = {"chunksize": PART_BYTES} if "s3" in protocols else {}
        self._answered = False
        self._exclusive: bool | None = None

    def cat_file(self, path: str) -> bytes:
        """A small file's bytes."""
        return bytes(self._call(path, lambda: self.fs.cat_file(path)))

    def get_file(self, path: str, target: str) -> None:
        """Fetch a file of any size."""
        self._call(path, lambda: self.fs.get_file(path, target))

    def put_file(self, source: Path, path: str) -> None:
        """Send a file of any size; on a disk it is moved."""
        if self.is_local:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            sync(source)
            source.replace(path)
        else:
            self._call(path, lambda: self.fs.put_file(str(source), path, **self._chunked))

    def write(self, path: str, data: bytes) -> None:
        """Write a small file, over an older one if there is one; readers see the one or the other."""
        if not self.is_local:
            self._call(path, lambda: self.fs.pipe_file(path, data))
            return
        part = self._part(path, data)
        part.replace(path)

    def create(self, path: str, data: bytes) -> bool:
        """Write a small file unless it is there; whether this call wrote it. Of two at once one gets True."""
        if self.is_local:
            part = self._part(path, data)
            try:
                Path(path).hardlink_to(part)  # atomic, on NFS too
            except FileExistsError:
                return False
            finally:
                part.unlink()
            return True
        if self.size(path) is not None:
            return False
        try:
            self._call(path, lambda: self._create(path, data))
        except FileExistsError:
            return self._reads(path, data)  # a try that was not answered may have been ours
        if self._exclusive is None:
            self._exclusive = self._refuses_another(path, data)
        if not self._exclusive:
            time.sleep(SETTLE_SECONDS)  # of two that wrote, the last one's bytes stay
        return self._exclusive or self._reads(path, data)

    def size(self, path: str) -> int | None:
        """Bytes of a file; None where there is none."""
        try:
            return int(self._call(path, lambda: self.fs.info(path))["size"])
        except FileNotFoundError:
            return None

    def walk(self, folder: str) -> dict[str, Found]:
        """All files below `folder`, by relative path."""
        try:
            listed = self._call(folder, lambda: self.fs.find(folder, detail=True))
        except FileNotFoundError:
            return {}
        return {
            name[len(folder) :].lstrip("/"): Found(int(entry["size"]), _modified(entry))
            for name, entry in listed.items()
            if name.startswith(f"{folder}/")
        }

    def names(self, folder: str) -> list[str]:
        """Names of what lies in `folder`, files and folders."""
        try:
            listed = self._call(folder, lambda: self.fs.ls(folder, detail=False))
        except FileNotFoundError:
            return []
        return sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in listed)

    def remove(self, path: str) -> None:
        """Remove a file; nothing happens where there is none."""
        with suppress(FileNotFoundError):
            self._call(path, lambda: self.fs.rm_file(path))

    def remove_tree(self, folder: str) -> None:
        """Remove a folder with all in it."""
        if self.is_local:
            shutil.rmtree(folder, ignore_errors=True)
            return
        with suppress(FileNotFoundError):
            self._call(folder, lambda: self.fs.rm(folder, recursive=True))

    def sha256(self, path: str) -> str:
        """Of a file's content, read in parts."""
        return str(self._call(path, lambda: self._sha256(path)))

    def show(self, path: str) -> str:
        """A path as its user knows it."""
        return path if self.is_local else str(self.fs.unstrip_protocol(path))

    def _refuses_another(self, path: str, data: bytes) -> bool:
        """Whether the server heeds "create". AWS and most others do; some write all the same."""
        try:
            self._call(path, lambda: self._create(path, data))
        except FileExistsError:
            return True
        return False

    def _create(self, path: str, data: bytes) -> None:
        try:
            self.fs.pipe_file(path, data, mode="create")
        except (NotImplementedError, TypeError):
            self.fs.pipe_file(path, data)
        except OSError as error:
            if error.errno != errno.ENOSYS:
                raise
            self.fs.pipe_file(path, data)

    def _reads(self, path: str, data: bytes) -> bool:
        try:
            return self.cat_file(path) == data
        except FileNotFoundError:
            return False

    def _part(self, path: str, data: bytes) -> Path:
        part = Path(f"{path}.{uuid.uuid4().hex}")
        part.parent.mkdir(parents=True, exist_ok=True)
        try:
            try:
                part.write_bytes(data)
            except FileNotFoundError:  # another process has just tidied the empty folder away
                part.parent.mkdir(parents=True, exist_ok=True)
                part.write_bytes(data)
            sync(part)
        except OSError:
            part.unlink(missing_ok=True)
            raise
        return part

    def _sha256(self, path: str) -> str:
        digest = hashlib.sha256()
        with self.fs.open(path, "rb", block_size=PART_BYTES) as file:
            while part := file.read(PART_BYTES):
                digest.update(part)
        return digest.hexdigest()

    def _call(self, path: str, request: Callable[[], Value]) -> Value:
        """One request, tried again where that may help."""
        if self.is_local:
            return request()
        waits = list(WAITS) if self._answered else []
        while True:
            try:
                value = request()
            except (FileNotFoundError, FileExistsError) as error:
                if code_of(error) == "NoSuchBucket":
                    raise StoreError(
                        f"{self.show(path)}: there is no such bucket; make it, or correct `store: {self.url}`"
                    ) from None
                self._answered = True
                raise
            except Exception as error:  # noqa: BLE001 - every file system has its own errors; none is dropped
                if not waits or not may_pass(error):
                    raise StoreError(f"{self.show(path)}: {words_of(error)}") from error
                time.sleep(waits.pop(0))
            else:
                self._answered = True
                return value


def sync(path: Path) -> None:
    """Let a file, or a folder's list of names, reach the disk: a rename must not outlive what it names (fsync(2))."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _modified(entry: dict[str, Any]) -> datetime:
    for key in ("LastModified", "mtime", "last_modified", "updated", "created"):
        value = entry.get(key)
        if isinstance(value, datetime):
            return value if value.tzinfo else value.replace(tzinfo=UTC)
        if isinstance(value, int | float):
            return datetime.fromtimestamp(value, UTC)
    return datetime.now(UTC)  # a file system that does not say: nothing there is ever old
