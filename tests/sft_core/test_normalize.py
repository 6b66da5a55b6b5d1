"""normalize: conservation of rows."""

import json
import random
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from sft_core.artifacts import Outcome, check_ledger
from sft_core.errors import DataError
from sft_core.fetch import fetch_dataset
from sft_core.normalize import (
    MAP_FNS,
    NormalizeSource,
    normalize_dataset,
)
from sft_core.normalize.limits import check_lost
from sft_core.normalize.sketch import sketch
from sft_core.recipe import DatasetConfig, NormalizeConfig
from sft_core.shard_rows import read_shards
from sft_core.shards import Sharding

HERE = Sharding()
PLAIN = [{"text": f"T{n}"} for n in range(9)]
GENERATOR = "<generator object read.<locals>.<genexpr>>"


def source(tmp_path: Path, rows: list, name: str = "rows", **keys) -> NormalizeSource:
    """A fetched data set of these rows; texts are lines as they stand."""
    lines = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
    folder, fetched = tmp_path / "sources" / name, tmp_path / "fetched" / f"{name}-{zlib.crc32(lines.encode())}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.jsonl").write_text(lines, "utf-8")
    fetch_dataset(DatasetConfig(path=str(folder / f"{name}.jsonl")), fetched)
    return NormalizeSource(rows=fetched, name=name, **{"map_fn": "default", **keys})


def normalize(
    out: Path,
    *sources: NormalizeSource,
    fraction: float = 0.5,
    seed: int = 0,
    limit: float = 1,
    near: float | None = None,
    sharding: Sharding = HERE,
) -> Outcome:
    """Run the step and check that its ledger, its files and its figures agree."""
    config = NormalizeConfig(near_duplicates=near)
    outcome = normalize_dataset(sources, config, fraction, seed, out, sharding)
    check_lost(outcome.facts, outcome.ledger, {source.name: source.map_fn for source in sources}, limit)
    check_ledger("normalize", outcome.ledger)
    train, heldout = side(out, "train"), side(out, "heldout")
    assert outcome.ledger["rows"]["out"] == len(train) + len(heldout)
    assert (outcome.facts["train_rows"], outcome.facts["heldout_rows"]) == (len(train), len(heldout))
    aside = {key: n for key, n in outcome.ledger["rows"]["set_aside"].items() if key != "not_sampled"}
    assert aside == Counter(row["reason"] for row in quarantine(out))
    assert outcome.ledger["characters"]["out"] == sum(map(characters, train + heldout))
    ids = [row["row_id"] for row in heldout]
    assert len(set(ids)) == len(ids)
    assert not {row["row_id"] for row in train} & set(ids)
    places = [(row["dataset"], row["file"], row["row_number"]) for row in train + heldout + quarantine(out)]
    assert len(set(places)) == len(places)
    return outcome


def side(out: Path, name: str) -> list[dict]:
    return list(read_shards(out / name))


def characters(row: dict) -> int:
    """Of contents and thoughts."""
    return sum(len(message["content"]) + len(message["reasoning_content"] or "") for message in row["messages"])


def quarantine(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "quarantine" / "part-00000.jsonl").read_text("utf-8").split("\n")[:-1]]


def pairs(count: int, start: int = 0) -> list[dict]:
    return [{"input": f"Q{n}", "output": f"A{n}"} for n in range(start, start + count)]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def answers(rows: list[dict]) -> set[str]:
    return {row["messages"][-1]["content"] for row in rows}


class TestRows:
    def test_where_each_row_goes(self, tmp_path):
        rows = [*pairs(8), {"input": "Q"}, "{broken", {"input": "Q", "output": "\ud800"}, "7"]
        outcome = normalize(tmp_path / "out", source(tmp_path, rows))
        assert outcome.ledger == {
            "rows": {
                "in": 12,
                "out": 8,
                "set_aside": {"missing_column": 1, "not_json": 1, "not_utf8": 1, "wrong_type": 1},
            },
            "turns": {"in": 8, "out": 8, "set_aside": {}},
            "characters": {"in": 32, "out": 32, "set_aside": {}},
        }
        assert outcome.facts["quarantined_fraction"] == pytest.approx(1 / 3)
        assert quarantine(tmp_path / "out")[1] == {
            "dataset": "rows",
            "file": "rows.jsonl",
            "row_number": 10,
            "reason": "not_json",
            "detail": "Expecting property name enclosed in double quotes at column 2",
            "row": "{broken",
        }
        assert outcome.facts["examples"]["missing_column"] == {
            "dataset": "rows",
            "file": "rows.jsonl",
            "row_number": 9,
            "detail": "no column 'output'; there are input",
        }

    def test_a_change_of_output_needs_a_new_step_version(self, tmp_path):
        normalize(tmp_path / "out", source(tmp_path, pairs(3)), fraction=0.6)
        first = next(row for row in side(tmp_path / "out", "train") if row["row_number"] == 2)
        plain = dict.fromkeys(["tool_calls", "name", "tool_call_id", "reasoning_content"])
        assert first == {
            "row_id": "c21995abb16230af98c09d0a6010d985",  # of [["user","Q1"],["assistant","A1"]], by sha256sum
            "messages": [
                {"role": "user", "content": "Q1", "weight": None} | plain,
                {"role": "assistant", "content": "A1", "weight": 1} | plain,
            ],
            "tools": None,
            "dataset": "rows",
            "file": "rows.jsonl",
            "row_number": 2,
        }
        signature = np.load(tmp_path / "out" / "signatures" / "part-00000.npy")[0]
        assert signature[:8].tobytes().hex() == "cd2b65dec7cc384a"  # of `q1 a1`, by openssl dgst -shake128
        whole = sketch([" ".join(map(str, range(100)))])[0]
        assert whole[:8].tolist() == [38, 100, 230, 236, 220, 194, 106, 150]

    def test_text_that_is_not_utf8_in_a_detail(self, tmp_path):
        (tmp_path / "mine.py").write_text("def read(row):\n    raise ValueError(row['input'])\n")
        rows = source(tmp_path, ['{"input": "\\ud800"}', *pairs(2)], map_fn=f"{tmp_path / 'mine.py'}:read")
        with pytest.raises(DataError, match="no training rows"):
            normalize(tmp_path / "out", rows)
        assert quarantine(tmp_path / "out")[0]["detail"] == "ValueError: \\ud800"

    def test_bare_message_lists(self, tmp_path):
        rows = [[{"role": "user", "content": "Q"}, {"role": "assistant", "content": f"A{n}"}] for n in range(9)]
        outcome = normalize(tmp_path / "out", source(tmp_path, rows, map_fn="openai"))
        assert outcome.ledger["rows"]["out"] == 9

    def test_a_map_fn_that_raises(self, tmp_path):
        (tmp_path / "mine.py").write_text("def read(row):\n    return {'text': row['input'] + row['extra']}\n")
        rows = [*pairs(2), *({"input": "I", "extra": f"{n}"} for n in range(9))]
        normalize(tmp_path / "out", source(tmp_path, rows, map_fn=f"{tmp_path / 'mine.py'}:read"))
        assert [(row["reason"], row["detail"]) for row in quarantine(tmp_path / "out")] == [
            ("map_fn_error", "KeyError: 'extra'"),
            ("map_fn_error", "KeyError: 'extra'"),
        ]
        assert side(tmp_path / "out", "train")[0]["messages"][0]["role"] == "text"

    def test_a_map_fn_may_leave_rows_out(self, tmp_path):
        (tmp_path / "mine.py").write_text("def read(row):\n    return row['input'] in 'Q0Q1Q2' and None or row['c']\n")
        rows = [
            *({"input": f"Q{n}", "c": None} for n in range(3)),
            *({"input": f"{n}", "c": PLAIN[n]} for n in range(9)),
        ]
        name = f"{tmp_path / 'mine.py'}:read"
        outcome = normalize(tmp_path / "out", source(tmp_path, rows, map_fn=name), limit=0)
        assert outcome.ledger["rows"] == {"in": 12, "out": 9, "set_aside": {"left_out": 3}}
        assert outcome.facts["quarantined_fraction"] == 0
        assert [row["detail"] for row in quarantine(tmp_path / "out")] == ["the map_fn returned None"] * 3
        with pytest.raises(DataError, match="The map_fn returns None, which leaves a row out"):
            normalize(tmp_path / "none", source(tmp_path, rows[:3], "none", map_fn=name))

    def test_what_else_a_map_fn_may_do(self, tmp_path):
        (tmp_path / "mine.py").write_text(
            "def read(row):\n"
            "    if row['input'] == 'Q0': return (turn for turn in ())\n"
            "    if row['input'] == 'Q1': raise SystemExit(0)\n"
            "    if row['input'] == 'Q2': raise ValueError(object())\n"
            "    turns = [dict(row)]\n"
            "    row.clear()\n"
            "    return {'conversation': turns}\n"
        )
        normalize(tmp_path / "out", source(tmp_path, pairs(12), map_fn=f"{tmp_path / 'mine.py'}:read"))
        shapes = "a map_fn returns {'conversation': [...]}, {'messages': [...]} or {'text': '...'}"
        assert [(row["row"], row["reason"], row["detail"]) for row in quarantine(tmp_path / "out")] == [
            ('{"input": "Q0", "output": "A0"}', "bad_conversation", f"{shapes}; this one returned {GENERATOR}"),
            ('{"input": "Q1", "output": "A1"}', "map_fn_error", "SystemExit: 0"),
            ('{"input": "Q2", "output": "A2"}', "map_fn_error", "ValueError: <object object>"),
        ]

    @pytest.mark.parametrize("text", ["next(COUNT)", "random.random()", "time.time_ns()"])
    def test_a_map_fn_that_depends_on_more_than_the_row(self, tmp_path, text):
        code = "import itertools, random, time\nCOUNT = itertools.count()\n"
        (tmp_path / "mine.py").write_text(f"{code}def read(row):\n    return {{'text': str({text})}}\n")
        with pytest.raises(DataError, match=r"mine\.py:read' returns something else when it is called again"):
            normalize(tmp_path / "out", source(tmp_path, pairs(12), map_fn=f"{tmp_path / 'mine.py'}:read"))

    @pytest.mark.parametrize("seed", range(4))
    @pytest.mark.parametrize("map_fn", list(MAP_FNS))
    def test_no_row_is_lost_whatever_it_holds(self, tmp_path, seed, map_fn):
        draw = random.Random(seed)
        columns = "instruction input output text messages prompt completion conversation conversations tools system "
        columns += "question answer response context description color abstract title system_prompt"

        def value(depth: int) -> object:
            tools = ["from", "value", "name", "function", "arguments", "tool_call_id", "type", "text", "thinking"]
            words = ["human", "gpt", "tool", "function_call", "text", "thinking"]
            plain = [
                *words,
                "",
                " ",
                "x",
                "### Human: a### Assistant: b",
                None,
                0,
                1.5,
                True,
                "\ud800",
                "user",
                "assistant",
            ]
            kind = draw.random()
            if depth and kind < 0.2:
                return [value(depth - 1) for _ in range(draw.randint(0, 3))]
            if depth and kind < 0.4:
                keys = draw.choices(
                    ["role", "content", "loss", "input", "output", "system", "tool_calls", "reasoning"], k=4
                ) + draw.choices(tools, k=3)
                return {key: value(depth - 1) for key in keys}
            return draw.choice(plain)

        junk = [{c: value(3) for c in draw.sample(columns.split(), draw.randint(0, 12))} for _ in range(150)]
        good = source(tmp_path, pairs(10), "good")
        outcome = normalize(tmp_path / "out", good, source(tmp_path, [*junk, "{", "[1]"], "junk", map_fn=map_fn))
        assert outcome.ledger["rows"]["in"] == 162
        assert "map_fn_error" not in outcome.ledger["rows"]["set_aside"]
