"""normalize, shard by shard: what is taken is what would be made, and only what changed is made."""

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import pytest

from sft_core import shard_rows
from sft_core.fetch import fetch_dataset
from sft_core.normalize import NormalizeSource, heldout
from sft_core.recipe import DatasetConfig
from sft_core.shards import EarlierFolder, Sharding, read_shard_list
from tests.sft_core.test_normalize import contents, normalize, pairs, quarantine, side, source

SPAWN_TIMEOUT = 800
"""Seconds; two new processes import the project."""


@pytest.fixture(autouse=True)
def short_shards(monkeypatch):
    """A shard for about twenty rows."""
    monkeypatch.setattr(shard_rows, "ROWS_PER_CUT", 16)
    monkeypatch.setattr(shard_rows, "LEAST_ROWS", 4)
    monkeypatch.setattr(shard_rows, "MOST_ROWS", 64)


class Here:
    """`map`, which notes what it was given."""

    def __init__(self) -> None:
        self.made = 0

    def __call__(self, work, arguments) -> Iterator:
        self.made += len(arguments)
        return map(work, arguments)


def again(earlier: Path, out: Path, *sources: NormalizeSource, **keys) -> int:
    """Normalize with the shards of an earlier artifact; how many were made. It is checked against making all."""
    mapper = Here()
    outcome = normalize(out, *sources, sharding=Sharding(EarlierFolder(earlier), mapper), **keys)
    anew = normalize(out.with_name(f"{out.name}-anew"), *sources, **keys)
    assert contents(out) == contents(out.with_name(f"{out.name}-anew"))
    assert outcome == anew
    return mapper.made


def in_processes(work, arguments) -> list:
    """Results in order, whatever order they were made in."""
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(work, argument): place for place, argument in reversed(list(enumerate(arguments)))}
        made = {futures[future]: future.result() for future in as_completed(futures)}
    return [made[place] for place in range(len(made))]


def rows(count: int = 400) -> list:
    """Some of every fate."""
    return [*pairs(count // 2), {"input": "Q"}, "{broken", *pairs(count // 2, count // 2), *pairs(9), "7"]


class TestTaken:
    def test_nothing_is_made_twice(self, tmp_path):
        training, evaluation = source(tmp_path, rows()), source(tmp_path, pairs(50, 390), "evaluation", held_out=True)
        normalize(tmp_path / "out", training, evaluation, near=0.8)
        assert len(read_shard_list(tmp_path / "out")) > 10
        assert again(tmp_path / "out", tmp_path / "same", training, evaluation, near=0.8) == 0
        assert contents(tmp_path / "out") == contents(tmp_path / "same")
        *_, last = read_shard_list(tmp_path / "out")
        assert (last.place["dataset"], list(last.files)) == ("evaluation", ["candidates/*.parquet"])

    @pytest.mark.parametrize("at", [0, 150, 412])
    def test_new_rows_touch_their_own_shards_only(self, tmp_path, at):
        before = rows()
        normalize(tmp_path / "out", source(tmp_path, before), near=0.8)
        after = source(tmp_path, [*before[:at], *pairs(3, 9000), {"input": 1}, *before[at:]])
        assert 1 <= again(tmp_path / "out", tmp_path / "more", after, near=0.8) <= 2

    def test_origins_are_those_of_the_source(self, tmp_path):
        normalize(tmp_path / "out", source(tmp_path, rows()))
        after = [{"text": "new"}, *pairs(2, 7000), *rows()]
        again(tmp_path / "out", tmp_path / "more", source(tmp_path, after))
        kept = [*side(tmp_path / "more", "train"), *side(tmp_path / "more", "heldout")]
        assert len(kept) > 390
        for row in kept:
            answered = after[row["row_number"] - 1]["output"]
            assert (row["dataset"], row["file"], row["messages"][1]["content"]) == ("rows", "rows.jsonl", answered)
        refused = {(row["row_number"], row["reason"]) for row in quarantine(tmp_path / "more")}
        assert {(1, "missing_column"), (204, "missing_column"), (205, "not_json"), (415, "wrong_type")} <= refused

    def test_a_renamed_file_is_only_renamed(self, tmp_path):
        normalize(tmp_path / "out", source(tmp_path, rows(), "old"))
        assert again(tmp_path / "out", tmp_path / "renamed", source(tmp_path, rows(), "new")) == 0
        assert {row["file"] for row in side(tmp_path / "renamed", "train")} == {"new.jsonl"}

    def test_several_files_in_one_shard(self, tmp_path):
        folder = tmp_path / "folder"
        folder.mkdir()
        for name, start in (("a.jsonl", 0), ("b.jsonl", 3)):
            lines = [f'{{"input": "Q", "output": "A{n}"}}\n' for n in range(start, start + 3)]
            (folder / name).write_text("".join(lines))
        fetch_dataset(DatasetConfig(path=str(folder)), tmp_path / "fetched")
        normalize(tmp_path / "out", NormalizeSource(rows=tmp_path / "fetched", map_fn="default", name="d"))
        kept = [*side(tmp_path / "out", "train"), *side(tmp_path / "out", "heldout")]
        origins = {(r["messages"][1]["content"], r["file"], r["row_number"]) for r in kept}
        assert origins == {(f"A{n}", "a.jsonl" if n < 3 else "b.jsonl", n % 3 + 1) for n in range(6)}

    def test_the_held_out_side_in_parts(self, tmp_path, monkeypatch):
        training = source(tmp_path, rows())
        normalize(tmp_path / "one", training)
        monkeypatch.setattr(heldout, "MOST_ROWS", 50)
        normalize(tmp_path / "out", training)
        parts = sorted((tmp_path / "out" / "heldout").iterdir())
        assert [part.name for part in parts] == [f"part-{number:05d}.parquet" for number in range(len(parts))]
        assert len(parts) > 2
        assert side(tmp_path / "out", "heldout") == side(tmp_path / "one", "heldout")

    def test_a_damaged_shard_is_made_again(self, tmp_path):
        training = source(tmp_path, rows())
        normalize(tmp_path / "out", training)
        path = sorted((tmp_path / "out" / "signatures").iterdir())[3]
        path.write_bytes(path.read_bytes()[:-1] + b"?")
        again(tmp_path / "out", tmp_path / "same", training)


class TestMadeAnew:
    def changed(self, tmp_path: Path, before: dict, after: dict, **keys) -> tuple[int, int]:
        """(shards made, shards) with other keys."""
        normalize(tmp_path / "out", source(tmp_path, pairs(300), **before))
        made = again(tmp_path / "out", tmp_path / "other", source(tmp_path, pairs(300), **after), **keys)
        return made, len(read_shard_list(tmp_path / "other"))

    def test_by_what_decides_the_content(self, tmp_path):
        made, shards = self.changed(tmp_path, {}, {}, fraction=0.4)
        assert made == shards > 5
        made, shards = self.changed(tmp_path, {}, {"map_fn": "crime_kg_assitant"})
        assert made == shards > 5
        made, shards = self.changed(tmp_path, {}, {"weight": 0.9})
        assert made == shards > 5
        made, shards = self.changed(tmp_path, {"weight": 0.9}, {"weight": 0.9}, seed=1)
        assert made == shards > 5

    def test_by_nothing_else(self, tmp_path):
        assert self.changed(tmp_path, {}, {"weight": 3.5}, seed=1, near=0.7, limit=0.5)[0] == 0

    def test_by_a_map_fn_of_ones_own(self, tmp_path):
        file = tmp_path / "mine.py"
        name = f"{file}:read"
        file.write_text("def read(row):\n    return {'text': row['input'] + row['output']}\n")
        training = source(tmp_path, pairs(300), map_fn=name)
        normalize(tmp_path / "out", training)
        file.write_text("def read(row):\n    # the same\n    return {'text': row['input'] + row['output']}\n")
        assert again(tmp_path / "out", tmp_path / "same", training) == 0
        file.write_text("def read(row):\n    return {'text': row['input']}\n")
        made = again(tmp_path / "out", tmp_path / "other", training)
        assert made == len(read_shard_list(tmp_path / "other")) > 5
        assert {row["messages"][0]["content"][0] for row in side(tmp_path / "other", "train")} == {"Q"}

    def test_a_map_fn_is_loaded_once(self, tmp_path):
        file = tmp_path / "mine.py"
        log = tmp_path / "log"
        file.write_text(
            f"open({str(log)!r}, 'a').write('x')\ndef read(row):\n    return {{'text': row['input'] + row['output']}}\n"
        )
        training = source(tmp_path, pairs(100), map_fn=f"{file}:read")
        for loads in (1, 2):
            normalize(tmp_path / f"{loads}", training)
            assert log.read_text() == "x" * loads


@pytest.mark.timeout(SPAWN_TIMEOUT)
def test_other_processes_write_the_same_bytes(tmp_path):
    (tmp_path / "mine.py").write_text("def read(row):\n    return {'text': row['input'] + row['output']}\n")
    sources = source(tmp_path, rows()), source(tmp_path, pairs(80, 5000), "own", map_fn=f"{tmp_path / 'mine.py'}:read")
    here = normalize(tmp_path / "here", *sources, near=0.8)
    there = normalize(tmp_path / "there", *sources, near=0.8, sharding=Sharding(mapper=in_processes))
    assert contents(tmp_path / "here") == contents(tmp_path / "there")
    assert here == there
