"""How tests of fetch read what it wrote, and tell which shards it made anew."""

from pathlib import Path

from sft_core.artifacts import check_ledger
from sft_core.fetch import fetch_dataset, read_shards
from sft_core.recipe import DatasetConfig
from sft_core.shards import EarlierFolder, Sharding

ROW = '{"b": "\u4f60\u597d", "a": 1}'


def fetch(path: object, out: Path) -> list[tuple]:
    """Fetched rows as (row, file, row_number, problem)."""
    outcome = fetch_dataset(DatasetConfig(path=str(path)), out)
    check_ledger("fetch", outcome.ledger)
    rows = [tuple(row.values()) for row in read_shards(out / "rows")]
    assert outcome.ledger["rows"]["in"] == len(rows)
    return rows


def fetch_bytes(tmp_path: Path, name: str, content: bytes) -> list[tuple]:
    """The same, of a file with `content`."""
    (tmp_path / name).write_bytes(content)
    return fetch(tmp_path / name, tmp_path / "out")


def texts(rows: list[tuple]) -> list[str]:
    """The rows alone."""
    return [row[0] for row in rows]


def fetch_again(source: Path, out: Path, earlier: Path | None = None) -> int:
    """Fetch, and count the shards that were made: a shard that was taken is a second name of the earlier file."""
    sharding = Sharding(EarlierFolder(earlier)) if earlier else Sharding()
    outcome = fetch_dataset(DatasetConfig(path=str(source)), out, sharding=sharding)
    assert outcome.ledger["rows"]["in"] == len(located(out))
    return sum(path.stat().st_nlink == 1 for path in (out / "rows").iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def located(out: Path) -> list[tuple]:
    """Fetched rows as (file, row_number, row)."""
    return [(row["file"], row["row_number"], row["row"]) for row in read_shards(out / "rows")]
