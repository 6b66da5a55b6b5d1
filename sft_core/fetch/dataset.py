"""The fetch step itself.

In: a `DatasetConfig` and, where it was described before, its `SourceDescription`. Out: `rows/` below `out`.
Each file is copied beside the output, hashed on the way and parsed from that copy: what is parsed is what was hashed.
"""

import hashlib
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from fsspec.core import url_to_fs

from sft_core.artifacts import Outcome
from sft_core.errors import DataError, SourceError
from sft_core.fetch.formats import read_rows
from sft_core.fetch.hub import read_hub
from sft_core.fetch.json_rows import RawRow
from sft_core.fetch.other_hubs import read_other_hub
from sft_core.fetch.shards import RAW_SCHEMA, ShardWriter
from sft_core.fetch.source import SourceDescription, SourceFile, describe_source
from sft_core.fingerprint import CHUNK_BYTES
from sft_core.recipe import DatasetConfig

STEP_VERSION = 1


def fetch_dataset(dataset: DatasetConfig, out: Path, expected: SourceDescription | None = None) -> Outcome:
    """Write the source's rows to `out/rows`, unchanged. SourceError when it is no longer what `expected` says."""
    source = expected or describe_source(dataset)
    out.mkdir(parents=True, exist_ok=True)
    writer = ShardWriter(out / "rows", RAW_SCHEMA)
    with_problem = 0
    for label, raw in _rows(source, out):
        fields = {"row": raw.row, "file": label, "row_number": raw.row_number, "problem": raw.problem}
        writer.add(fields, len(raw.row))
        with_problem += raw.problem is not None
    if not writer.rows:
        raise DataError(
            f"data set {source.path!r} is empty: {len(source.files)} files, no row; check the path and split"
        )
    writer.close()
    return Outcome(
        ledger={"rows": {"in": writer.rows, "out": writer.rows, "set_aside": {}}},
        facts={
            "source": source.path,
            "commit": source.hub.commit if source.hub else None,
            "files": len(source.files),
            "bytes": sum(file.size for file in source.files),
            "rows_with_problem": with_problem,
        },
    )


def _rows(source: SourceDescription, out: Path) -> Iterator[tuple[str, RawRow]]:
    """(label of the file, row) of the whole source."""
    if source.hub:
        label = f"{source.hub.path}:{source.hub.split}"
        yield from ((label, raw) for raw in read_hub(source.hub))
    if source.other:
        label = f"{source.other.path}:{source.other.split}"
        yield from ((label, raw) for raw in read_other_hub(source.other))
    for file in source.files:
        with tempfile.TemporaryDirectory(dir=out, prefix=".reading-") as folder:
            copy = _copy(source.path, file, Path(folder))
            yield from ((file.label, raw) for raw in read_rows(copy, file.format, file.label))


def _copy(source: str, file: SourceFile, folder: Path) -> Path:
    """A local copy under the file's own base name, whose hash must be the expected one."""
    copy, digest = folder / PurePosixPath(file.path).name, hashlib.sha256()
    try:
        fs, _ = url_to_fs(source)
        reader = fs.open(file.path, "rb")
    except Exception as error:  # noqa: BLE001 - every file system raises errors of its own
        raise SourceError(f"{file.label}: cannot be opened: {type(error).__name__}: {error}") from error
    with reader, copy.open("wb") as local:
        while chunk := reader.read(CHUNK_BYTES):
            digest.update(chunk)
            local.write(chunk)
    if digest.hexdigest() != file.sha256:
        raise SourceError(f"{file.label} (of {source}) changed while it was being read; run again")
    return copy
