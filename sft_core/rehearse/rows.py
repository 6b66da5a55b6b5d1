"""The first rows of a source, in a file of their own, and how many rows there are in all.

In: a data set of a recipe. Out: JSON Lines of its first rows, each as it stands in the source (a broken one stays
broken, and is met by the same code as in a run). Rows of the hub are streamed; files are hashed, as planning does.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs

from sft_core.errors import SourceError
from sft_core.fetch import describe_source
from sft_core.fetch.compression import compression_of
from sft_core.fetch.formats import read_rows
from sft_core.fetch.json_rows import RawRow
from sft_core.fetch.other_hubs import read_other_hub
from sft_core.fetch.source import HubSource, SourceDescription, SourceFile
from sft_core.fetch.source_bytes import copy_file
from sft_core.fetch.table_rows import number_rows, without_decoding
from sft_core.recipe import DatasetConfig

COUNTED_BYTES = 32 << 20
"""A source up to this size is read to its end, to count its rows; of a larger one they are estimated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledRows:
    """`file` holds the first `rows` rows of `source`; `total`: rows of the whole source, None where nothing tells."""

    source: str
    file: Path
    rows: int
    total: int | None
    counted: bool
    """`total` is exact."""


def sample_rows(dataset: DatasetConfig, out: Path, count: int) -> SampledRows:
    """Write the source's first `count` rows to the file `out`. SourceError if it cannot be reached or read."""
    source = describe_source(dataset)
    if source.hub is not None:
        rows, total = _streamed(source.hub)
        written, _ = _write(islice(rows, count), out)
        known = total if written == count else written
        return SampledRows(source=dataset.path, file=out, rows=written, total=known, counted=known is not None)
    rows = read_other_hub(source.other) if source.other is not None else _rows_of_files(source, out.parent)
    written, characters = _write(islice(rows, count), out)
    size = sum(file.size for file in source.files)
    if size <= COUNTED_BYTES:
        return SampledRows(
            source=dataset.path, file=out, rows=written, total=written + sum(1 for _ in rows), counted=True
        )
    plain = all(file.format == "json" and compression_of(file.label) is None for file in source.files)
    about = round(size * written / characters) if plain and characters else None
    return SampledRows(source=dataset.path, file=out, rows=written, total=about, counted=False)


def texts_of(files: list[Path]) -> Iterator[str]:
    """Every text value in the rows of JSON Lines files; a broken line as it is."""
    for file in files:
        for line in file.read_text("utf-8").splitlines():
            try:
                yield from _texts(json.loads(line))
            except ValueError:
                yield line


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)


def _write(rows: Iterator[RawRow], out: Path) -> tuple[int, int]:
    """Rows written, and the bytes of their texts."""
    written, size = 0, 0
    with out.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
        for raw in rows:
            size += len(raw.row.encode("utf-8", "surrogatepass")) + 1
            file.write(f"{_one_line(raw.row)}\n")
            written += 1
    return written, size


def _one_line(text: str) -> str:
    if "\n" not in text and "\r" not in text:
        return text
    try:
        return json.dumps(json.loads(text), ensure_ascii=False)
    except ValueError:
        return " ".join(text.splitlines())


def _streamed(hub: HubSource) -> tuple[Iterator[RawRow], int | None]:
    from datasets import load_dataset  # here: slow to import, and no other source needs it

    try:
        rows = load_dataset(hub.path, name=hub.name, split=hub.split, revision=hub.commit, streaming=True)
    except Exception as error:  # noqa: BLE001 - builders and the hub's client raise errors of their own
        raise SourceError(
            f"{hub.path} (name {hub.name!r}, split {hub.split!r}, commit {hub.commit}): cannot be streamed: "
            f"{type(error).__name__}: {error}"
        ) from error
    split = (rows.info.splits or {}).get(hub.split)
    return number_rows(without_decoding(rows)), split.num_examples if split else None


def _rows_of_files(source: SourceDescription, folder: Path) -> Iterator[RawRow]:
    for file in source.files:
        yield from read_rows(_local(source, file, folder), file.format, file.label)


def _local(source: SourceDescription, file: SourceFile, folder: Path) -> Path:
    """The file itself where it is on this disk; a copy of a remote one, or of one that is unpacked beside itself."""
    fs, _ = url_to_fs(source.path)
    local = "file" in ([fs.protocol] if isinstance(fs.protocol, str) else fs.protocol)
    if local and compression_of(file.label) is None:
        return Path(file.path)
    return copy_file(source.path, file, folder)
