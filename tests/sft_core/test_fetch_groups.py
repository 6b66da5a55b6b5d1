"""fetch: files that are taken or read as a whole (small ones, arrays, tables, hubs), and an earlier artifact that is
damaged."""

import json
import random
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sft_core import shard_rows
from sft_core.fetch import cuts, fetch_dataset
from sft_core.fetch.source import SourceFile
from sft_core.recipe import DatasetConfig
from sft_core.shards import EarlierFolder, Sharding, read_shard_list
from tests.sft_core.fetched import contents, fetch_again, located

TEXTS = [json.dumps({"n": number, "text": f"t{number * 7919 % 1000}"}) for number in range(600)]
ROWS = [json.loads(text) for text in TEXTS]


@pytest.fixture(autouse=True)
def short_shards(monkeypatch):
    monkeypatch.setattr(shard_rows, "ROWS_PER_CUT", 16)
    monkeypatch.setattr(shard_rows, "LEAST_ROWS", 4)
    monkeypatch.setattr(shard_rows, "MOST_ROWS", 64)


def parsed(out: Path) -> list[tuple]:
    return [(file, number, json.loads(text)) for file, number, text in located(out)]


def write(rows: list[dict], path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    match path.suffix:
        case ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        case ".arrow":
            table = pa.Table.from_pylist(rows)
            with pa.ipc.new_stream(path, table.schema) as stream:
                stream.write_table(table)
        case ".csv":
            path.write_text("n,text\n" + "".join(f'{row["n"]},"{row["text"]}\n"\n' for row in rows))
        case ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        case _:
            path.write_text(json.dumps(rows))


class TestWholeFiles:
    @pytest.mark.parametrize("name", ["a.json", "a.csv", "a.parquet", "a.arrow", "a.jsonl"])
    def test_an_unchanged_file_is_not_read(self, tmp_path, name):
        write(ROWS, tmp_path / "source" / name)
        total = fetch_again(tmp_path / "source", tmp_path / "before")
        assert total > 10
        other = tmp_path / "source" / ("z" + name)
        (tmp_path / "source" / name).rename(other)
        assert fetch_again(tmp_path / "source", tmp_path / "again", tmp_path / "before") == 0
        before, again = contents(tmp_path / "before"), contents(tmp_path / "again")
        shards = before.pop("shards.json").decode(), again.pop("shards.json").decode()
        assert before == again
        assert shards[0].replace(f'"{name}"', f'"z{name}"') == shards[1]
        fetch_again(tmp_path / "source", tmp_path / "anew")
        assert contents(tmp_path / "again") == contents(tmp_path / "anew")
        step, first = (2, 2) if name == "a.csv" else (1, 1)  # a CSV's rows have two lines each, after the header's
        rows = [(label, number, int(row["n"])) for label, number, row in parsed(tmp_path / "again")]
        assert rows == [("z" + name, first + step * n, n) for n in range(len(ROWS))]

    @pytest.mark.parametrize("name", ["a.json", "a.csv", "a.parquet", "a.jsonl"])
    def test_a_changed_file_keeps_the_bytes_of_its_other_shards(self, tmp_path, name):
        write(ROWS, tmp_path / "source" / name)
        fetch_again(tmp_path / "source", tmp_path / "before")
        write([*ROWS[:300], {"n": -1, "text": "new"}, *ROWS[300:]], tmp_path / "source" / name)
        total = fetch_again(tmp_path / "source", tmp_path / "after", tmp_path / "before")
        assert total == len(read_shard_list(tmp_path / "after"))
        before = set(contents(tmp_path / "before" / "rows").values())
        assert len(set(contents(tmp_path / "after" / "rows").values()) - before) <= 2

    def test_a_hub_that_has_not_changed_is_not_loaded_again(self, tmp_path, monkeypatch):
        from datasets import load_dataset

        from sft_core.fetch import HubSource, SourceDescription

        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
        write(ROWS, tmp_path / "hub" / "train.jsonl")
        hub = HubSource(path=str(tmp_path / "hub"), name=None, split="train", commit="e" * 40)
        source = SourceDescription(path="owner/rows", hub=hub)
        fetch_dataset(DatasetConfig(path="owner/rows"), tmp_path / "before", source)
        shutil.rmtree(tmp_path / "hub")
        with pytest.raises(FileNotFoundError):
            load_dataset(hub.path)
        sharding = Sharding(EarlierFolder(tmp_path / "before"))
        fetch_dataset(DatasetConfig(path="owner/rows"), tmp_path / "again", source, sharding)
        assert contents(tmp_path / "again") == contents(tmp_path / "before")
        assert [row for _, _, row in parsed(tmp_path / "again")] == ROWS


class TestSmallFiles:
    def test_a_file_added_amid_thousands_touches_its_group(self, tmp_path):
        for number in range(2400):
            write(ROWS[number % 600 : number % 600 + 1], tmp_path / "source" / f"{number:04}.jsonl")
        total = fetch_again(tmp_path / "source", tmp_path / "before")
        shards = read_shard_list(tmp_path / "before")
        groups = len({tuple(shard.place["files"]) for shard in shards})
        assert 2 < groups < 60
        write([{"n": -1, "text": "new"}], tmp_path / "source" / "1200a.jsonl")
        made = fetch_again(tmp_path / "source", tmp_path / "after", tmp_path / "before")
        (group,) = {tuple(s.place["files"]) for s in read_shard_list(tmp_path / "after")} - {
            tuple(shard.place["files"]) for shard in shards
        }
        assert "1200a.jsonl" in group
        assert 0 < made < total / 2
        fetch_again(tmp_path / "source", tmp_path / "anew")
        assert contents(tmp_path / "after") == contents(tmp_path / "anew")
        names = sorted([*(f"{number:04}.jsonl" for number in range(2400)), "1200a.jsonl"])
        rows = parsed(tmp_path / "after")
        assert [(name, number) for name, number, _ in rows] == [(name, 1) for name in names]
        assert rows[1201] == ("1200a.jsonl", 1, {"n": -1, "text": "new"})

    def test_empty_files_and_blank_lines_are_no_rows_and_no_shards(self, tmp_path):
        (tmp_path / "source").mkdir()
        for name, text in {"a": "", "b": "\n\n", "c": "\n{}\n\n", "d": "[]", "e": " "}.items():
            (tmp_path / "source" / f"{name}.jsonl").write_text(text)
        fetch_again(tmp_path / "source", tmp_path / "out")
        (shard,) = read_shard_list(tmp_path / "out")
        assert shard.place == {"files": [f"{name}.jsonl" for name in "abcde"], "first_row": 0}
        assert [row for row in parsed(tmp_path / "out") if row[0] == "c.jsonl"] == [("c.jsonl", 2, {})]

    def test_groups_keep_the_order_are_bounded_and_leave_large_files_alone(self, monkeypatch):
        monkeypatch.setattr(cuts, "GROUP_BYTES", 50_000)
        monkeypatch.setattr(cuts, "MOST_GROUP_BYTES", 20_000)
        monkeypatch.setattr(cuts, "LEAST_FILE_BYTES", 10)
        draw = random.Random(1)
        sizes = [draw.choice([*[1, 300, 2000] * 9, 1_000_000]) for _ in range(3000)]
        files = [
            SourceFile(path=str(n), label=str(n), format="json", size=size, sha256=f"{draw.getrandbits(256):064x}")
            for n, size in enumerate(sizes)
        ]
        groups = list(cuts.group_files(files))
        assert [file for group in groups for file in group] == files
        assert all(len(group) == 1 for group in groups if any(file.size == 1_000_000 for file in group))
        assert max(sum(max(file.size, 10) for file in group[:-1]) for group in groups) < 20_000
        assert any(len(group) > 5 for group in groups)


class TestDamage:
    @pytest.mark.parametrize("small", [0, 1_000_000])
    @pytest.mark.parametrize("damage", ["changed", "cut", "gone", "longer"])
    def test_a_damaged_shard_is_made_again(self, tmp_path, monkeypatch, damage, small):
        monkeypatch.setattr(cuts, "SMALL_FILE_BYTES", small)
        write(ROWS, tmp_path / "source" / "a.jsonl")
        fetch_again(tmp_path / "source", tmp_path / "before")
        whole, path = contents(tmp_path / "before"), tmp_path / "before" / "rows" / "part-00003.parquet"
        data = path.read_bytes()
        at = len(data) // 2
        broken = {"changed": data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :], "cut": data[:-9], "longer": data * 2}
        path.unlink() if damage == "gone" else path.write_bytes(broken[damage])
        assert fetch_again(tmp_path / "source", tmp_path / "again", tmp_path / "before") == 1
        assert contents(tmp_path / "again") == whole
        assert damage == "gone" or path.read_bytes() == broken[damage]

    @pytest.mark.parametrize("small", [0, 1_000_000])
    def test_an_earlier_folder_without_its_shards_or_its_list(self, tmp_path, monkeypatch, small):
        monkeypatch.setattr(cuts, "SMALL_FILE_BYTES", small)
        write(ROWS, tmp_path / "source" / "a.jsonl")
        total = fetch_again(tmp_path / "source", tmp_path / "before")
        whole = contents(tmp_path / "before")
        (tmp_path / "torn").mkdir()
        assert fetch_again(tmp_path / "source", tmp_path / "none", tmp_path / "torn") == total
        shutil.copyfile(tmp_path / "before" / "shards.json", tmp_path / "torn" / "shards.json")
        assert fetch_again(tmp_path / "source", tmp_path / "list", tmp_path / "torn") == total
        assert contents(tmp_path / "none") == contents(tmp_path / "list") == whole
