"""fetch: what Parquet and Arrow columns of every type become as JSON text."""

import datetime
import decimal
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sft_core.errors import SourceError
from sft_core.fetch import arrow_rows, fetch_dataset, read_shards
from sft_core.recipe import DatasetConfig

NOT_UTF8 = pa.Array.from_buffers(
    pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0\5\0\0\0"), pa.py_buffer(b"okx\xffy")]
)


def fetch(path: Path, out: Path) -> list[tuple]:
    fetch_dataset(DatasetConfig(path=str(path)), out)
    return [(row["row"], row["row_number"], row["problem"]) for row in read_shards(out / "rows")]


def write(table: pa.Table, path: Path) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
    return path


ONE_VALUE = {
    "nested": (
        pa.array([{"m": [{"role": "user", "n": None}], "e": {}}]),
        {"m": [{"role": "user", "n": None}], "e": {}},
    ),
    "list of lists": (pa.array([[[1], [], None]]), [[1], [], None]),
    "all null": (pa.nulls(1), None),
    "bool": (pa.array([True]), True),
    "uint64": (pa.array([2**64 - 1], pa.uint64()), 2**64 - 1),
    "double": (pa.array([0.1]), 0.1),
    "decimal": (pa.array([decimal.Decimal("12345678901234567890.10")]), "12345678901234567890.10"),
    "bytes": (pa.array([b"\xff\x00"]), "/wA="),
    "large text": (pa.array(["\u4f60"], pa.large_string()), "\u4f60"),
    "dictionary": (pa.array(["a"]).dictionary_encode(), "a"),
    "map": (pa.array([[("k", 1), ("l", None)]], pa.map_(pa.string(), pa.int64())), {"k": 1, "l": None}),
    "map with a key twice": (pa.array([[("k", 1), ("k", 2)]], pa.map_(pa.string(), pa.int64())), [["k", 1], ["k", 2]]),
    "map of numbers": (pa.array([[(1, "a")]], pa.map_(pa.int64(), pa.string())), [[1, "a"]]),
    "maps in a list": (pa.array([[[("k", b"x")]]], pa.list_(pa.map_(pa.string(), pa.binary()))), [{"k": "eA=="}]),
    "json": (pa.array(['{"a": [1, null], "b": "\u00e9"}'], pa.json_()), {"a": [1, None], "b": "\u00e9"}),
    "json of a text": (pa.array(['"5"'], pa.json_()), "5"),
    "json that is none": (pa.array(["{broken"], pa.json_()), "{broken"),
    "json in a struct": (
        pa.StructArray.from_arrays([pa.array(["[1]"], pa.json_()), pa.nulls(1)], ["j", "n"]),
        {"j": [1], "n": None},
    ),
    "date": (pa.array([0], pa.date32()), "1970-01-01"),
    "time": (pa.array([1], pa.time64("us")), "00:00:00.000001"),
    "time ns": (pa.array([1_001], pa.time64("ns")), "00:00:00.000001001"),
    "time ns without ns": (pa.array([1_000], pa.time64("ns")), "00:00:00.000001"),
    "timestamp": (pa.array([1], pa.timestamp("us")), "1970-01-01T00:00:00.000001"),
    "timestamp ns": (pa.array([1], pa.timestamp("ns")), "1970-01-01T00:00:00.000000001"),
    "timestamp zone": (pa.array([0], pa.timestamp("s", "Asia/Shanghai")), "1970-01-01T08:00:00+08:00"),
    "duration": (pa.array([datetime.timedelta(seconds=90)]), "0:01:30"),
}


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize("name", ONE_VALUE)
def test_a_value_of_every_type(tmp_path, name, kind):
    array, expected = ONE_VALUE[name]
    if kind == "parquet" and name == "nested":
        array, expected = pa.array([{"m": [{"role": "user", "n": None}]}]), {"m": [{"role": "user", "n": None}]}
    ((text, _, problem),) = fetch(write(pa.table({"x": array}), tmp_path / f"a.{kind}"), tmp_path / "out")
    assert (json.loads(text), problem) == ({"x": expected}, None)


OUT_OF_PYTHON = {
    "date": (pa.array([0, 10**8], pa.date32()), "100000000", "not_text: column 'x' of type date32[day]: "),
    "timestamp": (pa.array([0, 10**15], pa.timestamp("ms")), "1000000000000000", "not_text: column 'x' of type times"),
    "zone": (pa.array([None, 7], pa.timestamp("us", "No/Where")), "7", "not_text: column 'x' of type timestamp[us, tz"),
    "text": (NOT_UTF8, "x\\xffy", "not_utf8: column 'x' of type string: "),
}


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize("name", OUT_OF_PYTHON)
def test_a_value_that_python_cannot_hold_is_a_problem_of_its_row(tmp_path, name, kind):
    array, shown, problem = OUT_OF_PYTHON[name]
    table = pa.table({"x": array, "y": [1, 2]})
    good, bad = fetch(write(table, tmp_path / f"a.{kind}"), tmp_path / "out")
    assert (good[1], good[2]) == (1, None)
    assert (json.loads(bad[0]), bad[1]) == ({"x": shown, "y": 2}, 2)
    assert bad[2].startswith(problem)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_column_named_twice(tmp_path, kind):
    table = pa.table([pa.array([1]), pa.array([2])], names=["a", "a"])
    with pytest.raises(SourceError, match=rf"a\.{kind}: it names these columns twice: 'a'; rename one"):
        fetch(write(table, tmp_path / f"a.{kind}"), tmp_path / "out")


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_rows_are_numbered_across_batches(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(arrow_rows, "ROWS_PER_BATCH", 3)
    table = pa.table({"x": list(range(10))})
    rows = fetch(write(table, tmp_path / f"a.{kind}"), tmp_path / "out")
    assert [(json.loads(text)["x"], number) for text, number, _ in rows] == [(n, n + 1) for n in range(10)]


def test_offsets_that_point_outside_are_an_error_not_a_crash(tmp_path):
    path = write(pa.table({"x": ["y" * 1234]}), tmp_path / "a.arrow")
    content = path.read_bytes()
    offsets = b"\0\0\0\0\xd2\x04\0\0"  # 0, 1234
    before, _, after = content.rpartition(offsets)
    path.write_bytes(before + b"\0\0\0\0\xff\xff\xff\x0f" + after)
    with pytest.raises(SourceError, match=r"a\.arrow: damaged, or cut short: ArrowInvalid"):
        fetch(path, tmp_path / "out")


def test_a_stream_that_ends_between_two_batches(tmp_path):
    path = write(pa.table({"x": [1, 2]}), tmp_path / "a.arrow")
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(SourceError, match=r"a\.arrow: the end mark of the Arrow stream is missing"):
        fetch(path, tmp_path / "out")
