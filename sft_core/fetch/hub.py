"""Rows of a hub data set at one commit.

In: a `HubSource`. Out: `RawRow`s, numbered in the order of the split. The hub's client keeps its own download cache.
"""

from collections.abc import Iterator

from sft_core.errors import SourceError
from sft_core.fetch.json_rows import RawRow
from sft_core.fetch.source import HubSource
from sft_core.fetch.table_rows import number_dataset_rows


def read_hub(hub: HubSource) -> Iterator[RawRow]:
    """Rows of one split. SourceError when the data set, its configuration or its split cannot be loaded."""
    from datasets import load_dataset  # here: slow to import, and no other source needs it

    try:
        rows = load_dataset(hub.path, name=hub.name, split=hub.split, revision=hub.commit)
    except Exception as error:  # noqa: BLE001 - builders and the hub's client raise errors of their own
        raise SourceError(
            f"{hub.path} (name {hub.name!r}, split {hub.split!r}, commit {hub.commit}): cannot be loaded: "
            f"{type(error).__name__}: {error}"
        ) from error
    yield from number_dataset_rows(rows)
