"""fetch: folders that `save_to_disk` wrote, plain folders of many formats, compressed files."""

import bz2
import gzip
import json
import lzma
import shutil
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from sft_core.errors import SourceError
from sft_core.fetch import describe_source, fetch_dataset, read_shards
from sft_core.recipe import DatasetConfig


def fetch(path: object, out: Path, **keys: str) -> list[tuple]:
    fetch_dataset(DatasetConfig(path=str(path), **keys), out)
    return [tuple(row.values()) for row in read_shards(out / "rows")]


def parts(path: object, **keys: str) -> dict:
    return describe_source(DatasetConfig(path=str(path), **keys)).parts


def save(rows: list[dict], folder: Path, shards: int = 1) -> None:
    Dataset.from_list(rows).save_to_disk(str(folder), num_shards=shards)


ROWS = [{"a": number, "b": [f"\u4f60{number}"]} for number in range(5)]
TEXTS = [json.dumps(row, ensure_ascii=False) for row in ROWS]


class TestSaveToDisk:
    def test_a_dataset_of_two_shards(self, tmp_path):
        save(ROWS, tmp_path / "saved", shards=2)
        one, two = "data-00000-of-00002.arrow", "data-00001-of-00002.arrow"
        assert fetch(tmp_path / "saved", tmp_path / "out") == [
            (TEXTS[0], one, 1, None),
            (TEXTS[1], one, 2, None),
            (TEXTS[2], one, 3, None),
            (TEXTS[3], two, 1, None),
            (TEXTS[4], two, 2, None),
        ]

    def test_identity_is_the_arrow_files_bytes(self, tmp_path):
        save(ROWS, tmp_path / "one")
        before = parts(tmp_path / "one")
        assert [file["format"] for file in before["files"]] == ["arrow"]
        save(ROWS, tmp_path / "two")
        state = tmp_path / "two" / "state.json"
        state.write_text(json.dumps({**json.loads(state.read_text()), "_fingerprint": "another"}))
        assert parts(tmp_path / "two") == before
        save(ROWS[:4], tmp_path / "three")
        assert parts(tmp_path / "three") != before

    def test_what_map_left_in_the_folder_is_no_data(self, tmp_path):
        save(ROWS, tmp_path / "saved")
        before = parts(tmp_path / "saved")
        shutil.copy(
            tmp_path / "saved" / "data-00000-of-00001.arrow", tmp_path / "saved" / "cache-0123456789abcdef.arrow"
        )
        assert parts(tmp_path / "saved") == before

    def test_the_split_of_a_dict(self, tmp_path):
        sides = {"train": Dataset.from_list(ROWS), "validation": Dataset.from_list(ROWS[:1])}
        DatasetDict(sides).save_to_disk(str(tmp_path / "both"))
        assert len(fetch(tmp_path / "both", tmp_path / "one")) == 5
        assert len(fetch(f"{tmp_path}/both/", tmp_path / "two", split="validation")) == 1
        with pytest.raises(SourceError, match="without the split 'test'; it has: train, validation"):
            parts(tmp_path / "both", split="test")

    def test_saved_data_sets_below_a_plain_folder(self, tmp_path):
        save(ROWS[:1], tmp_path / "all" / "a")
        save(ROWS[1:2], tmp_path / "all" / "b")
        (tmp_path / "all" / "c.jsonl").write_text(TEXTS[2] + "\n")
        rows = fetch(tmp_path / "all", tmp_path / "out")
        assert [(row[0], row[1]) for row in rows] == [
            (TEXTS[0], "a/data-00000-of-00001.arrow"),
            (TEXTS[1], "b/data-00000-of-00001.arrow"),
            (TEXTS[2], "c.jsonl"),
        ]

    def test_a_shard_that_is_missing(self, tmp_path):
        save(ROWS, tmp_path / "saved", shards=2)
        (tmp_path / "saved" / "data-00001-of-00002.arrow").unlink()
        with pytest.raises(SourceError, match=r"state\.json lists .*00001-of-00002\.arrow, which is not there; copy"):
            parts(tmp_path / "saved")

    @pytest.mark.parametrize(
        ("state", "message"),
        [
            ("{", "not JSON"),
            ("[]", "not a JSON object"),
            ("{}", "not what save_to_disk writes: KeyError"),
            ('{"_indices_data_files": [{"filename": "indices.arrow"}]}', "selection of rows; load it with"),
        ],
    )
    def test_a_state_that_cannot_be_read(self, tmp_path, state, message):
        save(ROWS, tmp_path / "saved")
        (tmp_path / "saved" / "state.json").write_text(state)
        with pytest.raises(SourceError, match=message):
            parts(tmp_path / "saved")


def test_a_folder_of_every_format_is_read_in_the_order_of_names(tmp_path):
    folder, table = tmp_path / "src", pa.Table.from_pylist([{"a": "1"}])
    folder.mkdir()
    (folder / "a.json").write_text('[{"a": "1"}]')
    (folder / "b.jsonl").write_text('{"a": "1"}')
    (folder / "c.csv").write_text("a\n1\n")
    pq.write_table(table, folder / "d.parquet")
    with pa.ipc.new_file(folder / "e.arrow", table.schema) as writer:
        writer.write_table(table)
    with pa.ipc.new_stream(folder / "f.arrow", table.schema) as writer:
        writer.write_table(table)
    assert [row[:2] for row in fetch(folder, tmp_path / "out")] == [
        ('{"a": "1"}', name) for name in ("a.json", "b.jsonl", "c.csv", "d.parquet", "e.arrow", "f.arrow")
    ]


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as writer:
        writer.write(content)
    return sink.getvalue().to_pybytes()


CODECS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstd}


class TestCompressed:
    @pytest.mark.parametrize("suffix", CODECS)
    def test_two_streams_in_a_row_are_one_file(self, tmp_path, suffix):
        pack = CODECS[suffix]
        (tmp_path / f"a.jsonl.{suffix}").write_bytes(pack(b'{"a": 1}\n') + pack(b'{"a": 2}'))
        assert [row[0] for row in fetch(tmp_path / f"a.jsonl.{suffix}", tmp_path / "out")] == ['{"a": 1}', '{"a": 2}']

    @pytest.mark.parametrize("suffix", CODECS)
    @pytest.mark.parametrize("kind", ["parquet", "arrow"])
    def test_tables(self, tmp_path, suffix, kind):
        table = pa.Table.from_pylist(ROWS)
        if kind == "parquet":
            pq.write_table(table, tmp_path / "plain")
        else:
            with pa.ipc.new_stream(tmp_path / "plain", table.schema) as writer:
                writer.write_table(table)
        path = tmp_path / f"a.{kind}.{suffix}"
        path.write_bytes(CODECS[suffix]((tmp_path / "plain").read_bytes()))
        assert [row[0] for row in fetch(path, tmp_path / "out")] == TEXTS

    @pytest.mark.parametrize("suffix", CODECS)
    def test_cut_short(self, tmp_path, suffix):
        path = tmp_path / f"a.jsonl.{suffix}"
        path.write_bytes(CODECS[suffix](b"".join(b'{"a": %d}\n' % number for number in range(9999)))[:-9])
        with pytest.raises(SourceError, match=r"a\.jsonl\.\w+: (damaged, or cut short|cannot be read)"):
            fetch(path, tmp_path / "out")

    def test_zip(self, tmp_path):
        with zipfile.ZipFile(tmp_path / "a.jsonl.zip", "w") as archive:
            archive.writestr("inside.jsonl", '{"a": 1}\n')
        assert fetch(tmp_path / "a.jsonl.zip", tmp_path / "out") == [('{"a": 1}', "a.jsonl.zip", 1, None)]
        with zipfile.ZipFile(tmp_path / "b.jsonl.zip", "w") as archive:
            archive.writestr("one.jsonl", '{"a": 1}\n')
            archive.writestr("two.jsonl", '{"a": 2}\n')
        with pytest.raises(SourceError, match=r"b\.jsonl\.zip: a zip of 2 files; unpack it"):
            fetch(tmp_path / "b.jsonl.zip", tmp_path / "no")
