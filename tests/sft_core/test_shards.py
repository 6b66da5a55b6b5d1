"""Shards: taken from an earlier artifact or made, the folder's bytes are the same."""

import json
import random
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest

from sft_core.fingerprint import hash_folder
from sft_core.shard_rows import LEAST_ROWS, MOST_ROWS, Cutter, locate
from sft_core.shards import (
    SHARDS,
    EarlierFolder,
    EarlierRemote,
    Made,
    NothingEarlier,
    ShardJob,
    ShardWriter,
    build_shards,
    read_shard_list,
)


def shout(text: str) -> Made:
    """Work on one shard."""
    files = {"loud/*.txt": text.upper().encode()} | ({"odd/*.txt": b"odd"} if len(text) % 2 else {})
    return Made(files, {"characters": len(text)})


def build(texts: list[str], out: Path, earlier: object = None, mapper: object = map) -> ShardWriter:
    out.mkdir()
    writer = ShardWriter(out, earlier or NothingEarlier())  # type: ignore[arg-type]
    jobs = [ShardJob(f"key of {text}", text, {"first_row": 10 * number}) for number, text in enumerate(texts)]
    build_shards(jobs, shout, writer, mapper)  # type: ignore[arg-type]
    writer.close()
    return writer


def test_taken_and_made_shards_give_the_same_folder(tmp_path: Path) -> None:
    build(["one", "two", "three!"], tmp_path / "monday")
    fresh = build(["zero", "one", "three!", "four"], tmp_path / "fresh")
    again = build(["zero", "one", "three!", "four"], tmp_path / "again", EarlierFolder(tmp_path / "monday"))
    assert (fresh.reused, again.reused) == (0, 2)
    assert hash_folder(tmp_path / "again") == hash_folder(tmp_path / "fresh")
    shards = read_shard_list(tmp_path / "again")
    assert [(shard.name, shard.place["first_row"], shard.facts["characters"]) for shard in shards] == [
        ("part-00000", 0, 4),
        ("part-00001", 10, 3),
        ("part-00002", 20, 6),
        ("part-00003", 30, 4),
    ]
    assert shards[1].path(tmp_path / "again", "loud/*.txt").read_text() == "ONE"


def test_only_what_is_missing_is_worked_on(tmp_path: Path) -> None:
    build(["one", "two"], tmp_path / "monday")
    seen: list[str] = []

    def mapper(work: object, arguments: list[str]) -> object:
        seen.extend(arguments)
        return map(shout, arguments)

    build(["one", "new", "two"], tmp_path / "tuesday", EarlierFolder(tmp_path / "monday"), mapper)
    assert seen == ["new"]


@pytest.mark.parametrize("damage", ["changed", "cut", "gone"])
def test_a_damaged_shard_is_made_again_and_the_earlier_file_left_alone(tmp_path: Path, damage: str) -> None:
    build(["one", "two"], tmp_path / "monday")
    victim = tmp_path / "monday" / "loud" / "part-00001.txt"
    match damage:
        case "changed":
            victim.write_text("TWX")
        case "cut":
            victim.write_text("T")
        case "gone":
            victim.unlink()
    before = victim.read_bytes() if victim.exists() else None
    writer = build(["one", "two"], tmp_path / "tuesday", EarlierFolder(tmp_path / "monday"))
    assert writer.reused == 1
    assert (tmp_path / "tuesday" / "loud" / "part-00001.txt").read_text() == "TWO"
    assert (victim.read_bytes() if victim.exists() else None) == before


def test_an_earlier_artifact_in_a_remote_store(tmp_path: Path) -> None:
    build(["one", "two"], tmp_path / "monday")
    fs = fsspec.filesystem("memory")
    fs.put(str(tmp_path / "monday"), "/store/monday", recursive=True)
    writer = build(["two", "three"], tmp_path / "tuesday", EarlierRemote(fs, "/store/monday"))
    build(["two", "three"], tmp_path / "fresh")
    assert writer.reused == 1
    assert hash_folder(tmp_path / "tuesday") == hash_folder(tmp_path / "fresh")


def test_the_list_is_json_one_shard_a_line(tmp_path: Path) -> None:
    build(["one", "two"], tmp_path / "monday")
    text = (tmp_path / "monday" / SHARDS).read_text()
    assert len(text.splitlines()) == 2
    assert [entry["name"] for entry in json.loads(text)] == ["part-00000", "part-00001"]


def borders(rows: list[bytes]) -> list[list[bytes]]:
    cutter, shards = Cutter(), [[]]
    for row in rows:
        shards[-1].append(row)
        if cutter.ends_after(row):
            shards.append([])
    return shards


def test_an_inserted_row_moves_few_borders() -> None:
    drawn = random.Random(0)
    rows = [drawn.randbytes(20) for _ in range(50_000)]
    before = {tuple(shard) for shard in borders(rows)}
    for at in (0, 1, 25_000, 49_999, 50_000):
        after = borders([*rows[:at], b"new", *rows[at:]])
        assert sum(tuple(shard) not in before for shard in after) <= 3
    sizes = [len(shard) for shard in borders(rows)][:-1]
    assert min(sizes) >= LEAST_ROWS
    assert max(sizes) <= MOST_ROWS
    assert 10 <= len(sizes) <= 40


def test_equal_rows_end_a_shard_too() -> None:
    assert {len(shard) for shard in borders([b"same"] * 50_000)} == {MOST_ROWS, 50_000 % MOST_ROWS}


def test_locate_leaves_named_rows_alone() -> None:
    row = {"file": "a.jsonl", "row_number": 7}
    assert locate(row, {"files": ["b"], "first_row": 5}) == row
    located = locate({"file": 1, "row_number": 7}, {"files": ["a", "b"], "first_row": 5, "dataset": "d", "weight": 1})
    assert located == {"file": "b", "row_number": 12, "dataset": "d"}


def test_the_module_needs_nothing_heavy() -> None:
    code = "import sys, sft_core.shards; print(sorted({'torch', 'pyarrow', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
