"""What a small file may cost: bombs become a row set aside, or one error, in bounded memory; large real rows are
read."""

import bz2
import gzip
import json
import lzma
import re
import resource
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest

from sft_core.bounds import MOST_ROW_BYTES
from sft_core.errors import SourceError
from sft_core.fetch import fetch_dataset, read_shards
from sft_core.fetch.arrow_sizes import sizes_of
from sft_core.recipe import DatasetConfig

MOST_MEGABYTES = 1_300
"""Peak of a process that fetches a bomb: 200 to 500 were measured, 130 of them the imports; a bomb asks for 1,800 and
more."""
SECONDS = 400
"""Bound on one fetch; a few are usual."""
FETCH = """
import json, resource, sys
from pathlib import Path
from sft_core.errors import SftError
from sft_core.fetch import fetch_dataset, read_shards
from sft_core.fetch.arrow_sizes import sizes_of
from sft_core.recipe import DatasetConfig
try:
    fetch_dataset(DatasetConfig(path=sys.argv[1]), Path(sys.argv[2]))
    rows = list(read_shards(Path(sys.argv[2]) / "rows"))
    said = {"rows": len(rows), "problems": [row["problem"] for row in rows if row["problem"]]}
except SftError as error:
    said = {"error": str(error)}
print(json.dumps({**said, "megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000}))
"""
LINE = 200_000_000
"""Characters of a row that gzip makes 200 KB of."""


def in_a_process(path: Path, *arguments: str) -> dict:
    command = [sys.executable, "-c", FETCH, str(path), str(path) + ".out", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout)
    assert said["megabytes"] < MOST_MEGABYTES, said
    assert len(said.get("error", "").splitlines()) <= 1, said["error"]
    return said


def write_by_pieces(file, before: bytes = b'{"text": "', after: bytes = b'"}\n', count: int = LINE) -> None:
    file.write(before)
    for _ in range(count // 1_000_000):
        file.write(b"x" * 1_000_000)
    file.write(after)


def one_gzip_line(path: Path) -> Path:
    with gzip.open(path / "a.jsonl.gz", "wb") as file:
        write_by_pieces(file)
        file.write(b'{"text": "next"}\n')
    return path / "a.jsonl.gz"


def one_plain_line(path: Path) -> Path:
    with (path / "a.jsonl").open("wb") as file:
        file.write(b'{"text": "first"}\n')
        write_by_pieces(file)
    return path / "a.jsonl"


def csv_of_one_field(path: Path) -> Path:
    with gzip.open(path / "a.csv.gz", "wb") as file:
        write_by_pieces(file, b'text\n"', b'"\n')
    return path / "a.csv.gz"


def json_of_one_value(path: Path) -> Path:
    with bz2.open(path / "a.json.bz2", "wb") as file:
        write_by_pieces(file, b'[{"text": "', b'"}]')
    return path / "a.json.bz2"


def parquet_of_one_value(path: Path) -> Path:
    values = pa.DictionaryArray.from_arrays(pa.array([0] * 1000, pa.int32()), pa.array(["x" * 20_000_000]))
    pq.write_table(pa.table({"text": values, "id": list(range(1000))}), path / "a.parquet", compression="zstd")
    return path / "a.parquet"


def parquet_of_lists(path: Path) -> Path:
    values = pa.DictionaryArray.from_arrays(pa.array([0] * 30_000, pa.int32()), pa.array(["x" * 100_000]))
    lists = pa.ListArray.from_arrays(pa.array([0, 30_000], pa.int32()), values)
    pq.write_table(pa.table({"messages": lists}), path / "a.parquet", compression="zstd")
    return path / "a.parquet"


def arrow_of_views(path: Path) -> Path:
    texts = pa.array(["x" * 1_000_000] * 20)
    views = pa.ListViewArray.from_arrays(pa.array([0] * 1000, pa.int32()), pa.array([20] * 1000, pa.int32()), texts)
    table = pa.table({"texts": views})
    with pa.ipc.new_file(path / "a.arrow", table.schema) as file:
        file.write_table(table)
    return path / "a.arrow"


ROW_BOMBS = {
    "gzip line": (one_gzip_line, 2, 1),
    "plain line": (one_plain_line, 2, 1),
    "parquet dictionary": (parquet_of_one_value, 1000, 1000),
    "parquet lists": (parquet_of_lists, 1, 1),
    "arrow views": (arrow_of_views, 1000, 1000),
}


@pytest.mark.slow
@pytest.mark.parametrize(("bomb", "rows", "problems"), ROW_BOMBS.values(), ids=ROW_BOMBS)
def test_a_row_that_is_too_large_is_set_aside(tmp_path: Path, bomb: Callable[[Path], Path], rows: int, problems: int):
    said = in_a_process(bomb(tmp_path))
    assert said["rows"] == rows, said
    assert len(said["problems"]) == problems
    assert all(problem.startswith("too_large: ") and "16,777,216" in problem for problem in said["problems"])


@pytest.mark.slow
@pytest.mark.parametrize("bomb", [csv_of_one_field, json_of_one_value])
def test_a_value_behind_which_no_row_can_be_found_is_the_files_error(tmp_path: Path, bomb: Callable[[Path], Path]):
    error = in_a_process(bomb(tmp_path))["error"]
    assert "16,777,216 bytes, the most a row may have" in error
    assert "line 2" in error or "line 1, column 2" in error


def blank_gzip(path: Path) -> Path:
    with gzip.open(path / "a.jsonl.gz", "wb", compresslevel=1) as file:
        file.write(b'{"text": "a"}\n')
        for _ in range(300):
            file.write((b" " * 9_999 + b"\n") * 100)
    return path / "a.jsonl.gz"


def zip_of_rows(path: Path) -> Path:
    with zipfile.ZipFile(path / "a.jsonl.zip", "w", zipfile.ZIP_DEFLATED) as archive, archive.open("a", "w") as file:
        for _ in range(300):
            file.write((b'{"text": "' + b"x" * 9_988 + b'"}\n') * 100)
    return path / "a.jsonl.zip"


def csv_of_names(path: Path) -> Path:
    names = ",".join(f"{'x' * 100_000}{number}" for number in range(20))
    (path / "a.csv").write_text(names + "\n" + (",".join("1" * 20) + "\n") * 260)
    return path / "a.csv"


@pytest.mark.slow
@pytest.mark.parametrize("bomb", [blank_gzip, zip_of_rows, csv_of_names])
def test_a_file_that_expands_without_end_is_one_error(tmp_path: Path, bomb: Callable[[Path], Path]):
    error = in_a_process(bomb(tmp_path))["error"]
    assert re.search(r"a\..* expand to more than (2\d\d|4\d\d),\d{3},\d{3}, over 200 times as many", error)


@pytest.mark.parametrize("offset", [0, 1])
def test_sizes_are_those_of_the_rows(offset: int):
    texts = pa.array(["", "abc", None, "x" * 100])
    columns = {
        "text": texts,
        "dictionary": texts.dictionary_encode(),
        "list": pa.array([["abc"], [], None, ["x" * 50] * 2]),
        "view": pa.ListViewArray.from_arrays(pa.array([3, 0, 0, 1]), pa.array([1, 0, 4, 2]), texts),
        "fixed": pa.array([["a", "b"], ["c", ""], None, ["x" * 50, "x" * 50]], pa.list_(pa.string(), 2)),
        "map": pa.array([[("k", "v")], [], None, [("k", "x" * 100)]], pa.map_(pa.string(), pa.string())),
        "struct": pa.array([{"a": "", "b": 1}, None, {"a": "abc", "b": None}, {"a": "x" * 100, "b": 2}]),
        "runs": pa.RunEndEncodedArray.from_arrays([1, 3, 4], ["", "abc", "x" * 100]),
        "number": pa.array([1, 2, None, 4]),
    }
    wanted = {  # texts of the row, and 8 for each value, list, key and pair
        "text": [8, 11, 8, 108],
        "dictionary": [8, 11, 8, 108],
        "list": [19, 8, 8, 124],
        "view": [116, 8, 143, 27],
        "fixed": [26, 25, 24, 124],
        "map": [26, 8, 8, 125],
        "struct": [24, 24, 27, 124],
        "runs": [8, 11, 11, 108],
        "number": [8, 8, 8, 8],
    }
    for name, column in columns.items():
        assert sizes_of(column.slice(offset)).tolist() == wanted[name][offset:], name


def test_nulls_that_take_no_bytes_are_not_counted_one_by_one():
    lists = pa.LargeListArray.from_arrays(
        pa.array([0, 1 << 40], pa.int64()), pa.Array.from_buffers(pa.null(), 1 << 40, [None])
    )
    assert sizes_of(lists).tolist() == [8 + 8 * 2**40]


def test_xz_may_not_ask_for_a_gigabyte(tmp_path: Path):
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 30}]
    usual = lzma.compress(b'{"a": 1}\n')
    path = tmp_path / "a.jsonl.xz"
    path.write_bytes(usual + lzma.compress(b'{"a": 2}\n', filters=filters))
    with pytest.raises(SourceError, match=r"a\.jsonl\.xz.*Memory usage limit"):
        fetch_dataset(DatasetConfig(path=str(path)), tmp_path / "out")
    path.write_bytes(usual + b"\0\0\0\0" + lzma.compress(b'{"a": 2}\n', preset=9 | lzma.PRESET_EXTREME))
    fetch_dataset(DatasetConfig(path=str(path)), tmp_path / "out2")
    assert [row["row"] for row in read_shards(tmp_path / "out2" / "rows")] == ['{"a": 1}', '{"a": 2}']


@pytest.mark.parametrize("small", [True, False])
def test_rows_of_some_megabytes_are_read(tmp_path: Path, small: bool):
    text = "wörter " * 800_000
    assert len(text.encode()) < MOST_ROW_BYTES
    lines = [json.dumps({"text": text, "id": number}, ensure_ascii=False) for number in range(1 if small else 4)]
    files = {
        "a.jsonl.gz": gzip.compress("\n".join(lines).encode(), 1),
        "b.json": f"[{','.join(lines)}]".encode(),
        "c.csv": f'text\n"{text}"\n'.encode(),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    pq.write_table(pa.table({"text": [text] * len(lines)}), tmp_path / "d.parquet")
    for path in sorted(tmp_path.glob("*.*")):
        out = tmp_path / f"{path.name}-out"
        fetch_dataset(DatasetConfig(path=str(path)), out)
        rows = list(read_shards(out / "rows"))
        assert [row["problem"] for row in rows] == [None] * len(rows)
        assert {json.loads(row["row"])["text"] for row in rows} == {text}, path.name


def test_a_long_line_is_known_by_all_of_it(tmp_path: Path):
    keys = []
    for end in ("a", "b"):
        path = tmp_path / f"{end}.jsonl"
        path.write_text('{"text": "' + "x" * MOST_ROW_BYTES + end + '"}\n{"text": "y"}\n')
        fetch_dataset(DatasetConfig(path=str(path)), tmp_path / end)
        keys += [shard["key"] for shard in json.loads((tmp_path / end / "shards.json").read_text())]
    assert len(set(keys)) == 2


@pytest.mark.parametrize("depth", [100, 101, 950, 100_000])
def test_depth_of_a_row(tmp_path: Path, depth: int):
    nested = '{"a":' * depth + "1" + "}" * depth
    path = tmp_path / "a.jsonl"
    path.write_text(nested + '\n{"a": 1}\n')
    fetch_dataset(DatasetConfig(path=str(path)), tmp_path / "out")
    problems = [row["problem"] for row in read_shards(tmp_path / "out" / "rows")]
    assert problems == [None if depth <= 100 else "not_json: lists and objects nested more than 100 deep", None]


def test_a_table_of_many_columns_is_looked_at_once(tmp_path: Path):
    path = tmp_path / "a.csv"
    path.write_text(",".join(f"c{number}" for number in range(100_000)) + "\n")
    spent = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    with pytest.raises(Exception, match="empty"):
        fetch_dataset(DatasetConfig(path=str(path)), tmp_path / "out")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_utime - spent < 20, "0.1 s; minutes if each is counted alone"
