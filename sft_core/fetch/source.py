"""What a source is, before anything is copied.

In: a `DatasetConfig`. Out: `SourceDescription`, whose `parts` name the content: the files' formats and SHA-256 in order
of their names, the hub data set's commit, or the hash of another hub's rows. Never a file's path or name, or a time.
"""

import glob
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from fsspec.core import url_to_fs

from sft_core.errors import SourceError
from sft_core.fetch.compression import decompress, plain_suffix, reason
from sft_core.fetch.formats import READABLE, SUFFIXES, detect_format
from sft_core.fetch.other_hubs import OtherHubSource, describe_other_hub
from sft_core.fetch.saved import folder_files
from sft_core.fingerprint import CHUNK_BYTES
from sft_core.own_packages import ROOT
from sft_core.recipe import DatasetConfig

COMMIT = re.compile(r"[0-9a-f]{40}")
SHIPPED = "demo/data/"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    """One file. `path` is its file system's own name for it, `label` the one that people know."""

    path: str
    label: str
    format: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HubSource:
    """A hub data set at one commit."""

    path: str
    name: str | None
    split: str
    commit: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceDescription:
    """Files, a hub data set, or one of another hub. `path` is the source as the recipe has it."""

    path: str
    files: tuple[SourceFile, ...] = ()
    hub: HubSource | None = None
    other: OtherHubSource | None = None

    @property
    def parts(self) -> dict[str, Any]:
        """The content's identity, JSON-able: what fetch's fingerprint is made of."""
        if self.hub:
            return {"hub": self.hub.path, "name": self.hub.name, "split": self.hub.split, "commit": self.hub.commit}
        if self.other:
            return {"rows_sha256": self.other.rows_sha256}
        return {"files": [{"format": file.format, "sha256": file.sha256} for file in self.files]}


def describe_source(dataset: DatasetConfig) -> SourceDescription:
    """Find the source and hash it, or resolve its commit. SourceError when there is none."""
    path = dataset.path
    if not path.strip():
        raise SourceError("a data set's path is empty; name a file, a folder, a glob, an fsspec URL or a hub id")
    if dataset.source == "hub":
        return SourceDescription(path=path, hub=_describe_hub(dataset))
    if dataset.source:
        return SourceDescription(path=path, other=describe_other_hub(dataset))
    try:
        fs, root = url_to_fs(_shipped_rows(path) or path)
        files = _find_files(fs, root, dataset)
    except SourceError:
        raise
    except Exception as error:  # noqa: BLE001 - every file system raises errors of its own
        raise SourceError(f"{path}: cannot be listed: {type(error).__name__}: {error}") from error
    if files is None and "://" not in path and not glob.has_magic(path):
        return SourceDescription(path=path, hub=_describe_hub(dataset))
    if not files:
        raise SourceError(f"{path}: {_why_nothing(fs, root, files)}")
    return SourceDescription(path=path, files=tuple(_describe_file(fs, file, label) for file, label in files))


def _shipped_rows(path: str) -> str | None:
    """The demo's rows come with the packages; they are read from there where the current folder has none."""
    shipped = ROOT / path
    return str(shipped) if path.startswith(SHIPPED) and shipped.is_file() and not Path(path).exists() else None


def _find_files(fs: Any, root: str, dataset: DatasetConfig) -> list[tuple[str, str]] | None:
    """(path, label) of the source's files by name; None when nothing is there."""
    if fs.isfile(root):
        return [(root, PurePosixPath(root).name)]
    if fs.isdir(root):
        return folder_files(fs, root, dataset.split, dataset.name)
    if glob.has_magic(root):
        fixed = root[: re.search(r"[*?\[]", root).start()].rpartition("/")[0]  # type: ignore[union-attr]
        return [(path, path[len(fixed) :].lstrip("/")) for path in sorted(fs.glob(root)) if fs.isfile(path)]
    return None


def _why_nothing(fs: Any, root: str, files: list[tuple[str, str]] | None) -> str:
    if files is None:
        return f"no such file or folder in {fs.protocol if isinstance(fs.protocol, str) else fs.protocol[0]}"
    if glob.has_magic(root) and not fs.isdir(root):
        return "no file matches this pattern"
    return f"the folder holds no data files ({READABLE})"


def _describe_file(fs: Any, path: str, label: str) -> SourceFile:
    try:
        digest, size = hashlib.sha256(), 0
        with fs.open(path, "rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
                size += len(chunk)
        with fs.open(path, "rb") as packed, decompress(packed, label) as plain:
            head = plain.read(4096)
    except SourceError:
        raise
    except Exception as error:  # noqa: BLE001 - every file system and codec raises errors of its own
        raise SourceError(f"{label}: cannot be read: {reason(error)}; fetch it again") from error
    return SourceFile(path=path, label=label, format=detect_format(head, label), size=size, sha256=digest.hexdigest())


def _describe_hub(dataset: DatasetConfig) -> HubSource:
    """The hub data set at the commit that `revision` names now."""
    missing = f"{dataset.path}: no such file, and not"
    if not HUB_ID.fullmatch(dataset.path) or plain_suffix(dataset.path) in SUFFIXES:
        raise SourceError(f"{missing} a hub id (`owner/name`) either; relative paths start where the command runs")
    commit = dataset.revision if COMMIT.fullmatch(dataset.revision or "") else None
    if commit is None:
        from huggingface_hub import HfApi  # here: no other source needs it

        try:
            commit = HfApi().dataset_info(dataset.path, revision=dataset.revision).sha
        except Exception as error:  # noqa: BLE001 - the hub's client raises its HTTP library's own errors
            at = f" at revision {dataset.revision!r}" if dataset.revision else ""
            raise SourceError(
                f"{missing} reachable as a hub id{at}: {type(error).__name__}: {error}. Check the spelling, the "
                "network and, for gated data, the HF_TOKEN; offline, name a local file or a 40-digit commit as revision"
            ) from error
    if commit is None:
        raise SourceError(
            f"{dataset.path}: the hub names no commit for revision {dataset.revision!r}; name one that exists"
        )
    return HubSource(path=dataset.path, name=dataset.name, split=dataset.split, commit=commit)
