"""fetch: places, identity by content, the hub."""

import bz2
import gzip
import hashlib
import json
import lzma
import os
from types import SimpleNamespace

import fsspec
import huggingface_hub
import pytest

from sft_core import shard_rows
from sft_core.errors import DataError, SourceError
from sft_core.fetch import HubSource, SourceDescription, cuts, describe_source, fetch_dataset, read_shards
from sft_core.recipe import DatasetConfig
from tests.sft_core.fetched import ROW, fetch, fetch_bytes, texts


class TestPlaces:
    @pytest.mark.parametrize(("suffix", "codec"), [("gz", gzip), ("bz2", bz2), ("xz", lzma)])
    @pytest.mark.parametrize("small", [0, 1_000_000])
    def test_compressed(self, tmp_path, monkeypatch, suffix, codec, small):
        monkeypatch.setattr(cuts, "SMALL_FILE_BYTES", small)
        packed = codec.compress(f"{ROW}\n".encode())
        assert fetch_bytes(tmp_path, f"a.jsonl.{suffix}", packed) == [(ROW, f"a.jsonl.{suffix}", 1, None)]
        with pytest.raises(SourceError, match="damaged, or cut short|cannot be read"):
            fetch_bytes(tmp_path, f"b.jsonl.{suffix}", packed[:-6])

    def test_folder_and_glob(self, tmp_path):
        for name in ("src/b.jsonl", "src/a/c.json", "src/README.md", "src/.git/d.jsonl", "src/dataset_infos.txt"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(f'{{"name": "{name}"}}\n')
        assert [row[1] for row in fetch(tmp_path / "src", tmp_path / "one")] == ["a/c.json", "b.jsonl"]
        assert [row[1] for row in fetch(tmp_path / "src/**/*.json", tmp_path / "two")] == ["a/c.json"]

    def test_folder_that_save_to_disk_wrote(self, tmp_path):
        from datasets import Dataset, DatasetDict

        sides = {"train": Dataset.from_list([{"a": 1}]), "test": Dataset.from_list([{"a": 2}])}
        DatasetDict(sides).save_to_disk(str(tmp_path / "both"))
        assert texts(fetch(tmp_path / "both", tmp_path / "one")) == ['{"a": 1}']
        assert texts(fetch(tmp_path / "both/test", tmp_path / "two")) == ['{"a": 2}']

    def test_fsspec_url(self, tmp_path):
        fs = fsspec.filesystem("memory")
        fs.pipe({"/data/a.jsonl": f"{ROW}\n".encode(), "/data/b.jsonl.gz": gzip.compress(b'{"a": 2}\n')})
        assert texts(fetch("memory://data/a.jsonl", tmp_path / "one")) == [ROW]
        assert [row[1] for row in fetch("memory://data", tmp_path / "two")] == ["a.jsonl", "b.jsonl.gz"]
        assert texts(fetch("memory://data/b*", tmp_path / "three")) == ['{"a": 2}']

    @pytest.mark.parametrize(
        ("path", "message"),
        [
            ("memory://nowhere/a.jsonl", "no such file or folder in memory"),
            ("nowhere/*.jsonl", "no file matches this pattern"),
            ("nowhere/a.jsonl", "no such file, and not a hub id"),
            ("./a/b/c", "no such file, and not a hub id"),
            ("nosuch://a", "cannot be listed: ValueError"),
            (" ", "a data set's path is empty"),
        ],
    )
    def test_nothing_there(self, path, message):
        with pytest.raises(SourceError, match=message):
            describe_source(DatasetConfig(path=path))

    def test_a_folder_without_data(self, tmp_path):
        with pytest.raises(SourceError, match="the folder holds no data files"):
            describe_source(DatasetConfig(path=str(tmp_path)))

    def test_a_pipe_in_a_folder_is_not_waited_for(self, tmp_path):
        os.mkfifo(tmp_path / "a.jsonl")
        (tmp_path / "b.jsonl").write_text('{"a": 1}\n')
        assert [file.label for file in describe_source(DatasetConfig(path=str(tmp_path))).files] == ["b.jsonl"]

    @pytest.mark.parametrize(("name", "content"), [("a.jsonl", b""), ("a.json", b"[]"), ("a.csv", b"a,b\n")])
    def test_no_rows(self, tmp_path, name, content):
        with pytest.raises(DataError, match="is empty"):
            fetch_bytes(tmp_path, name, content)


class TestIdentity:
    def test_names_places_and_times_do_not_count(self, tmp_path):
        one, two = tmp_path / "one" / "a.jsonl", tmp_path / "two" / "b.jsonl"
        for path in (one, two):
            path.parent.mkdir()
            path.write_text('{"a": 1}\n')
        digest = hashlib.sha256(b'{"a": 1}\n').hexdigest()
        parts = {"files": [{"format": "json", "sha256": digest}]}
        assert describe_source(DatasetConfig(path=str(one))).parts == parts
        assert describe_source(DatasetConfig(path=str(two.parent), weight=0.5)).parts == parts
        two.write_text('{"a": 2}\n')
        assert describe_source(DatasetConfig(path=str(two))).parts != parts

    @pytest.mark.parametrize("small", [0, 1_000_000])
    def test_a_file_that_changes_meanwhile(self, tmp_path, monkeypatch, small):
        monkeypatch.setattr(cuts, "SMALL_FILE_BYTES", small)
        path = tmp_path / "a.jsonl"
        path.write_text('{"a": 1}\n')
        expected = describe_source(DatasetConfig(path=str(path)))
        path.write_text('{"a": 2}\n')
        with pytest.raises(SourceError, match="changed while it was being read; run again"):
            fetch_dataset(DatasetConfig(path=str(path)), tmp_path / "out", expected)

    def test_same_bytes_twice_and_nothing_else(self, tmp_path, monkeypatch):
        monkeypatch.setattr(shard_rows, "MOST_ROWS", 2)
        path = tmp_path / "a.jsonl"
        path.write_text('{"a": 1}\n{"a": 2}\n{"a": 3}\n')
        written = []
        for out in (tmp_path / "one", tmp_path / "two"):
            fetch(path, out)
            written.append({p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()})
        assert written[0] == written[1]
        assert sorted(written[0]) == ["rows/part-00000.parquet", "rows/part-00001.parquet", "shards.json"]

    def test_a_change_of_output_needs_a_new_step_version(self, tmp_path):
        rows = fetch_bytes(tmp_path, "a.jsonl", b'{"a": 1}\n\n{"a": "\xff"}\n')
        assert rows == [
            ('{"a": 1}', "a.jsonl", 1, None),
            ('{"a": "\\xff"}', "a.jsonl", 3, "not_utf8: byte 0xff at byte 8 of the line"),
        ]


class TestHub:
    def test_revision_becomes_a_commit(self, monkeypatch):
        asked = []

        def dataset_info(self, path, revision=None):
            asked.append((path, revision))
            return SimpleNamespace(sha="c" * 40)

        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
        parts = describe_source(DatasetConfig(path="owner/rows", revision="main", name="en")).parts
        assert parts == {"hub": "owner/rows", "name": "en", "split": "train", "commit": "c" * 40}
        assert asked == [("owner/rows", "main")]

    def test_a_commit_needs_no_network(self):
        source = describe_source(DatasetConfig(path="owner/rows", revision="d" * 40))
        assert source.hub == HubSource(path="owner/rows", name=None, split="train", commit="d" * 40)

    def test_offline(self, monkeypatch):
        def dataset_info(self, path, revision=None):
            raise OSError("Name or service not known")

        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
        with pytest.raises(
            SourceError, match=r"owner/rows: no such file, and not reachable as a hub id: OSError: Name"
        ):
            describe_source(DatasetConfig(path="owner/rows"))

    def test_rows_of_load_dataset(self, tmp_path, monkeypatch):
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
        (tmp_path / "rows").mkdir()
        (tmp_path / "rows" / "train.jsonl").write_text('{"b": "\u4f60", "a": 1}\n')
        hub = HubSource(path=str(tmp_path / "rows"), name=None, split="train", commit="e" * 40)
        source = SourceDescription(path="owner/rows", hub=hub)
        outcome = fetch_dataset(DatasetConfig(path="owner/rows"), tmp_path / "out", source)
        (row,) = read_shards(tmp_path / "out" / "rows")
        assert (json.loads(row["row"]), row["row_number"]) == ({"b": "\u4f60", "a": 1}, 1)
        assert outcome.facts["commit"] == "e" * 40
        wrong = SourceDescription(path="x", hub=HubSource(path=hub.path, name=None, split="nosuch", commit="e" * 40))
        with pytest.raises(SourceError, match="split 'nosuch'.*cannot be loaded"):
            fetch_dataset(DatasetConfig(path="owner/rows"), tmp_path / "no", wrong)
