"""The fetch step itself.

In: a `DatasetConfig`, where it was described before its `SourceDescription`, and where shards may be taken from. Out:
`rows/` and `shards.json` below `out`. Memory: one block of rows, whatever the source's size.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

from sft_core.artifacts import Outcome
from sft_core.errors import DataError
from sft_core.fetch.compression import compression_of
from sft_core.fetch.cuts import group_files, is_large
from sft_core.fetch.formats import named_lines, read_rows
from sft_core.fetch.hub import read_hub
from sft_core.fetch.other_hubs import read_other_hub
from sft_core.fetch.raw_shards import STEP_VERSION, FiledRow, RawShards, RowGroup
from sft_core.fetch.source import SourceDescription, SourceFile, describe_source
from sft_core.fetch.source_bytes import copy_file, holds_json_lines, plain_pieces
from sft_core.recipe import DatasetConfig
from sft_core.shards import Sharding

__all__ = ["STEP_VERSION", "fetch_dataset"]
FROM_NOTHING = Sharding()


def fetch_dataset(
    dataset: DatasetConfig,
    out: Path,
    expected: SourceDescription | None = None,
    sharding: Sharding = FROM_NOTHING,
) -> Outcome:
    """Write the source's rows to `out/rows`, unchanged. SourceError when it is no longer what `expected` says."""
    source = expected or describe_source(dataset)
    out.mkdir(parents=True, exist_ok=True)
    shards = RawShards(out, sharding.earlier)
    hub = source.hub or source.other
    if hub:
        shards.add_group(RowGroup([f"{hub.path}:{hub.split}"], source.parts, lambda: _hub_rows(source)))
    for files in group_files(source.files):
        _add_files(shards, source.path, files, out)
    rows = shards.total("rows")
    if not rows:
        raise DataError(
            f"data set {source.path!r} is empty: {len(source.files)} files, no row; check the path and split"
        )
    shards.close()
    return Outcome(
        ledger={"rows": {"in": rows, "out": rows, "set_aside": {}}},
        facts={
            "source": source.path,
            "commit": source.hub.commit if source.hub else None,
            "files": len(source.files),
            "bytes": sum(file.size for file in source.files),
            "rows_with_problem": shards.total("rows_with_problem"),
            "dropped_nulls": shards.total("dropped_nulls"),
        },
    )


def _add_files(shards: RawShards, source: str, files: list[SourceFile], out: Path) -> None:
    if is_large(files[0]) and holds_json_lines(source, files[0]):
        with tempfile.TemporaryDirectory(dir=out, prefix=".reading-") as folder:
            shards.add_lines(files[0].label, plain_pieces(source, files[0], Path(folder)))
        return
    content = [[file.sha256, file.format, compression_of(file.label), named_lines(file.label)] for file in files]
    shards.add_group(RowGroup([file.label for file in files], content, lambda: _file_rows(source, files, out)))


def _hub_rows(source: SourceDescription) -> Iterator[FiledRow]:
    if source.hub:
        yield from ((0, raw) for raw in read_hub(source.hub))
    if source.other:
        yield from ((0, raw) for raw in read_other_hub(source.other))


def _file_rows(source: str, files: list[SourceFile], out: Path) -> Iterator[FiledRow]:
    """Rows of files, each parsed from a copy beside the output."""
    with tempfile.TemporaryDirectory(dir=out, prefix=".reading-") as name:
        for index, file in enumerate(files):
            copy = copy_file(source, file, Path(name))
            yield from ((index, raw) for raw in read_rows(copy, file.format, file.label))
            for done in Path(name).iterdir():
                done.unlink()
