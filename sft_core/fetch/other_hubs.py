"""Rows of openMind and ModelScope data sets, read by those hubs' own packages, which are optional.

In: a `DatasetConfig` whose `source` names the hub. Out: `RawRow`s, numbered in the order of the split. Neither package
promises to resolve a branch to a commit; so such a source's identity is the SHA-256 of its rows' text. The rows are
read once for the plan and once when they are fetched (the packages keep a download cache of their own), and what is
fetched must have the planned hash.

openMind    openmind.OmDataset.load_dataset(path, name=, split=, revision=)
ModelScope  modelscope.msdatasets.MsDataset.load(path, subset_name=, split=, version=).to_hf_dataset()
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from sft_core.errors import SourceError
from sft_core.fetch.json_rows import RawRow
from sft_core.fetch.table_rows import number_dataset_rows
from sft_core.recipe import DatasetConfig

MODULE = {"openmind": "openmind", "modelscope": "modelscope.msdatasets"}
INSTALL = {"openmind": "pip install openmind", "modelscope": "pip install 'modelscope[datasets]'"}


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherHubSource:
    """A data set of another hub. `source` is that hub, `rows_sha256` the hash of its rows' text."""

    source: str
    path: str
    name: str | None
    split: str
    revision: str | None
    rows_sha256: str = ""


def describe_other_hub(dataset: DatasetConfig) -> OtherHubSource:
    """Load the data set and hash its rows."""
    keys: dict[str, Any] = {"path": dataset.path, "name": dataset.name, "split": dataset.split}
    unread = OtherHubSource(source=dataset.source or "", revision=dataset.revision, **keys)
    digest = hashlib.sha256()
    for raw in _rows(unread):
        _add(digest, raw)
    return OtherHubSource(source=unread.source, revision=unread.revision, rows_sha256=digest.hexdigest(), **keys)


def read_other_hub(hub: OtherHubSource) -> Iterator[RawRow]:
    """Rows of one split; a SourceError after the last when they are not those that were described."""
    digest = hashlib.sha256()
    for raw in _rows(hub):
        _add(digest, raw)
        yield raw
    if digest.hexdigest() != hub.rows_sha256:
        raise SourceError(f"{hub.path} ({hub.source}, split {hub.split!r}) changed since it was described; run again")


def _add(digest: Any, raw: RawRow) -> None:
    for text in (raw.row, raw.problem or ""):
        data = text.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "big") + data)


def _rows(hub: OtherHubSource) -> Iterator[RawRow]:
    package = _import(hub)
    try:
        rows = _load(package, hub)
    except Exception as error:  # noqa: BLE001 - each hub's client raises errors of its own
        raise SourceError(
            f"{_where(hub)}: cannot be loaded: {type(error).__name__}: {error}. Check the spelling, the network "
            "and, for private data, that hub's token"
        ) from error
    if isinstance(rows, Mapping):
        raise SourceError(f"{_where(hub)}: not one split but several: {', '.join(map(str, rows))}; name one as `split`")
    seen = 0
    try:
        for raw in number_dataset_rows(rows):
            seen = raw.row_number
            yield raw
    except SourceError:
        raise
    except Exception as error:  # noqa: BLE001 - a streamed data set is downloaded, and fails, while it is read
        raise SourceError(
            f"{_where(hub)}: cannot be read after row {seen}: {type(error).__name__}: {error}; run again"
        ) from error


def _import(hub: OtherHubSource) -> Any:
    try:
        return import_module(MODULE[hub.source])
    except ImportError as error:
        raise SourceError(
            f"{_where(hub)}: {MODULE[hub.source]} cannot be imported here ({type(error).__name__}: {error}); "
            f"{INSTALL[hub.source]}"
        ) from error


def _load(package: Any, hub: OtherHubSource) -> Any:
    """What the hub's package returns. A key that is not set is not passed: defaults are the package's."""
    if hub.source == "openmind":
        keys = {"name": hub.name, "split": hub.split, "revision": hub.revision}
        return package.OmDataset.load_dataset(hub.path, **{key: value for key, value in keys.items() if value})
    keys = {"subset_name": hub.name, "split": hub.split, "version": hub.revision}
    rows = package.MsDataset.load(hub.path, **{key: value for key, value in keys.items() if value})
    return rows.to_hf_dataset() if hasattr(rows, "to_hf_dataset") else rows


def _where(hub: OtherHubSource) -> str:
    at = f", revision {hub.revision!r}" if hub.revision else ""
    return f"{hub.path} ({hub.source}, name {hub.name!r}, split {hub.split!r}{at})"
