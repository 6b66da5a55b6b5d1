"""Messages, calls and tools in every type of column and every file format: read alike, without Arrow's own nulls."""

import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sft_core.fetch import fetch_dataset, read_shards
from sft_core.normalize import MAP_FNS, check_dataset
from sft_core.normalize.rows import read_conversation
from sft_core.recipe import DatasetConfig


def row(name: str, arguments: dict, properties: dict) -> dict:
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    tool = {"name": name, "parameters": {"type": "object", "properties": properties}}
    said = [{"role": "user", "content": "A"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    return {"messages": said, "tools": [{"type": "function", "function": tool}]}


ROWS = [
    row("add", {"a": 1, "b": [{"c": "x"}, {"d": 2.5}]}, {"a": {"type": "integer"}, "b": {"type": "array"}}),
    row("find", {"word": "w", "deep": {"e": "y"}}, {"word": {"type": "string", "enum": ["w", "v"]}}),
]
CALLS = [
    '[{"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [{"c": "x"}, {"d": 2.5}]}}}]',
    '[{"type": "function", "function": {"name": "find", "arguments": {"word": "w", "deep": {"e": "y"}}}}]',
]
TOOLS = [
    '[{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": '
    '{"a": {"type": "integer"}, "b": {"type": "array"}}}}}]',
    '[{"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": '
    '{"word": {"type": "string", "enum": ["w", "v"]}}}}}]',
]


def texts(rows: list[dict]) -> pa.Table:
    """Whole columns as JSON text."""
    return pa.table({name: [json.dumps(row[name]) for row in rows] for name in rows[0]})


def texts_each(rows: list[dict]) -> pa.Table:
    """A JSON text for each message and each tool."""
    return pa.table({name: [[json.dumps(entry) for entry in row[name]] for row in rows] for name in rows[0]})


def typed_json(rows: list[dict]) -> pa.Table:
    return pa.table({name: pa.array([json.dumps(row[name]) for row in rows], pa.json_()) for name in rows[0]})


def typed_json_each(rows: list[dict]) -> pa.Table:
    def column(name: str) -> pa.Array:
        flat = pa.array([json.dumps(entry) for row in rows for entry in row[name]], pa.json_())
        ends = [sum(len(row[name]) for row in rows[:count]) for count in range(len(rows) + 1)]
        return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), flat)

    return pa.table({name: column(name) for name in rows[0]})


def maps(rows: list[dict]) -> pa.Table:
    """Messages as `map<string, string>`."""
    kind = pa.list_(pa.map_(pa.string(), pa.string()))
    plain = [
        [{k: v if isinstance(v, str) else json.dumps(v) for k, v in message.items()} for message in row["messages"]]
        for row in rows
    ]
    pairs = pa.array([[list(message.items()) for message in messages] for messages in plain], kind)
    return pa.table({"messages": pairs, "tools": [json.dumps(row["tools"]) for row in rows]})


def lists(rows: list[dict]) -> pa.Table:
    """Structs of lists, as `datasets` makes of a Sequence of mappings."""

    def columns(entries: list[dict]) -> dict:
        names = dict.fromkeys(name for entry in entries for name in entry)
        return {name: [entry.get(name) for entry in entries] for name in names}

    return pa.table({name: [columns(row[name]) for row in rows] for name in rows[0]})


SHAPES = {
    "structs": pa.Table.from_pylist,
    "texts": texts,
    "a text each": texts_each,
    "json": typed_json,
    "json each": typed_json_each,
    "maps": maps,
    "structs of lists": lists,
}


def write(table: pa.Table, path: Path) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    elif path.suffix == ".arrow":
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, table.column_names)
            writer.writeheader()
            writer.writerows(table.to_pylist())
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, table.to_pylist())), "utf-8")
    else:
        path.write_text(json.dumps(table.to_pylist()), "utf-8")
    return path


def read(path: Path, out: Path, map_fn: str = "messages") -> list[tuple]:
    fetch_dataset(DatasetConfig(path=str(path)), out)
    read = [read_conversation(record, MAP_FNS[map_fn]) for record in read_shards(out / "rows")]
    return [(one.messages[-1]["tool_calls"], one.tools) for one in read]


@pytest.mark.parametrize(
    ("shape", "kind"),
    [(shape, kind) for shape in SHAPES for kind in ("parquet", "arrow")]
    + [(shape, kind) for shape in ("texts", "a text each") for kind in ("jsonl", "json")]
    + [("texts", "csv")],
)
def test_every_shape_in_every_format(tmp_path, shape, kind):
    path = write(SHAPES[shape](ROWS), tmp_path / f"rows.{kind}")
    assert read(path, tmp_path / "out") == list(zip(CALLS, TOOLS, strict=True))


@pytest.mark.parametrize("mode", [None, "use_json"])
@pytest.mark.parametrize("kind", ["parquet", "saved", "jsonl"])
def test_what_datasets_writes(tmp_path, mode, kind, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    from datasets import Dataset

    rows = Dataset.from_list(ROWS, on_mixed_types=mode)
    path = tmp_path / ("rows" if kind == "saved" else f"rows.{kind}")
    {"parquet": rows.to_parquet, "saved": rows.save_to_disk, "jsonl": rows.to_json}[kind](str(path))
    if kind == "jsonl" and mode is None:  # Arrow's nulls are in the text now: nobody can tell them from others
        assert '"d": null' in read(path, tmp_path / "out")[0][0]
    else:
        assert read(path, tmp_path / "out") == list(zip(CALLS, TOOLS, strict=True))


def test_types_that_differ_from_row_to_row(tmp_path):
    from datasets import Dataset

    rows = [row("f", {"a": 1, "n": None}, {}), row("f", {"a": "x"}, {}), row("f", {"a": {"b": [1, None]}}, {})]
    Dataset.from_list(rows, on_mixed_types="use_json").to_parquet(str(tmp_path / "rows.parquet"))
    calls = [
        json.loads(call)[0]["function"]["arguments"] for call, _ in read(tmp_path / "rows.parquet", tmp_path / "o")
    ]
    assert calls == [{"a": 1, "n": None}, {"a": "x"}, {"a": {"b": [1, None]}}]


class TestNulls:
    def test_those_of_json_stay(self, tmp_path):
        rows = [row("f", {"a": None, "b": {"c": None}}, {"a": {"default": None}})]
        (tmp_path / "rows.jsonl").write_text(json.dumps(rows[0]), "utf-8")
        ((calls, tools),) = read(tmp_path / "rows.jsonl", tmp_path / "out")
        assert json.loads(calls)[0]["function"]["arguments"] == {"a": None, "b": {"c": None}}
        assert '"default": null' in tools

    def test_those_of_structs_are_counted(self, tmp_path):
        path = write(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
        outcome = fetch_dataset(DatasetConfig(path=str(path)), tmp_path / "out")
        # the first row's word, deep, b[0].d, b[1].c and the schema of word; the second's a and b, and their schemas
        assert outcome.facts["dropped_nulls"] == 5 + 4
        report = check_dataset(DatasetConfig(path=str(path)))
        assert (report.map_fn, report.rows_out, report.dropped_nulls) == ("messages", 2, 9)
        texts = [json.loads(record["row"]) for record in read_shards(tmp_path / "out" / "rows")]
        assert texts[0]["messages"][0] == {"role": "user", "content": "A", "tool_calls": None}

    def test_a_call_of_nulls_alone_is_none(self, tmp_path):
        kind = pa.struct([("name", pa.string()), ("arguments", pa.string())])
        message = pa.struct([("role", pa.string()), ("content", pa.string()), ("function_call", kind)])
        said = [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}]
        said = [{**one, "function_call": {"name": None, "arguments": None}} for one in said]
        path = write(pa.table({"messages": pa.array([said], pa.list_(message))}), tmp_path / "rows.parquet")
        fetch_dataset(DatasetConfig(path=str(path)), tmp_path / "out")
        (record,) = read_shards(tmp_path / "out" / "rows")
        assert read_conversation(record, MAP_FNS["messages"]).messages[-1] == {
            "role": "assistant",
            "content": "B",
            "weight": 1,
        }


def test_prompt_and_completion_of_messages(tmp_path):
    """TRL's conversational form, through Parquet and CSV."""
    rows = [{"prompt": [{"role": "user", "content": "A"}], "completion": [{"role": "assistant", "content": "B"}]}]
    for kind, table in (("parquet", pa.Table.from_pylist(rows)), ("csv", texts(rows)), ("arrow", lists(rows))):
        path = write(table, tmp_path / f"rows.{kind}")
        report = check_dataset(DatasetConfig(path=str(path)))
        assert (report.map_fn, report.rows_out) == ("prompt_completion", 1), kind
