"""normalize: conservation of rows, sides that stay, the limits."""

import json
import random
from pathlib import Path

import pytest

from sft_core.artifacts import Outcome, check_ledger
from sft_core.errors import DataError
from sft_core.fetch import fetch_dataset, read_shards
from sft_core.normalize import (
    MAP_FNS,
    NormalizeSource,
    normalize_dataset,
)
from sft_core.recipe import DatasetConfig, NormalizeConfig


def source(tmp_path: Path, rows: list, name: str = "rows", **keys) -> NormalizeSource:
    """A fetched data set of these rows; texts are lines as they stand."""
    folder, fetched = tmp_path / "sources" / name, tmp_path / "fetched" / f"{name}-{len(rows)}"
    folder.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / f"{name}.jsonl").write_text("\n".join(lines), "utf-8")
    fetch_dataset(DatasetConfig(path=str(folder)), fetched)
    return NormalizeSource(rows=fetched, name=name, **{"map_fn": "default", **keys})


def normalize(out: Path, *sources: NormalizeSource, fraction: float = 0.5, seed: int = 0, limit: float = 1) -> Outcome:
    """Run the step and check that its ledger, its files and its figures agree."""
    outcome = normalize_dataset(sources, NormalizeConfig(max_quarantined_fraction=limit), fraction, seed, out)
    check_ledger("normalize", outcome.ledger)
    train, heldout = side(out, "train"), side(out, "heldout")
    assert outcome.ledger["rows"]["out"] == len(train) + len(heldout)
    assert (outcome.facts["train_rows"], outcome.facts["heldout_rows"]) == (len(train), len(heldout))
    aside = {key: n for key, n in outcome.ledger["rows"]["set_aside"].items() if key != "not_sampled"}
    assert sum(aside.values()) == len(quarantine(out))
    assert outcome.ledger["characters"]["out"] == sum(len(m["content"]) for r in train + heldout for m in r["messages"])
    ids = [row["row_id"] for row in train + heldout]
    assert len(set(ids)) == len(ids)
    return outcome


def side(out: Path, name: str) -> list[dict]:
    return list(read_shards(out / name))


def quarantine(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "quarantine" / "part-00000.jsonl").read_text("utf-8").split("\n")[:-1]]


def pairs(count: int, start: int = 0) -> list[dict]:
    return [{"input": f"Q{n}", "output": f"A{n}"} for n in range(start, start + count)]


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
        no_tools = dict.fromkeys(["tool_calls", "name", "tool_call_id"])
        assert first == {
            "row_id": "94142dc8d79468144585de55864b11df",
            "messages": [
                {"role": "user", "content": "Q1", "weight": None} | no_tools,
                {"role": "assistant", "content": "A1", "weight": 1} | no_tools,
            ],
            "tools": None,
            "dataset": "rows",
            "file": "rows.jsonl",
            "row_number": 2,
        }

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

    @pytest.mark.parametrize("seed", range(10))
    @pytest.mark.parametrize("map_fn", list(MAP_FNS))
    def test_no_row_is_lost_whatever_it_holds(self, tmp_path, seed, map_fn):
        draw = random.Random(seed)
        columns = "instruction input output text messages prompt completion conversation conversations tools system "
        columns += "question answer response context description color abstract title system_prompt"

        def value(depth: int) -> object:
            tools = ["from", "value", "name", "function", "arguments", "tool_call_id", "type", "text"]
            words = ["human", "gpt", "tool", "function_call", "text"]
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
                    ["role", "content", "loss", "input", "output", "system", "tool_calls"], k=4
                ) + draw.choices(tools, k=3)
                return {key: value(depth - 1) for key in keys}
            return draw.choice(plain)

        junk = [{c: value(3) for c in draw.sample(columns.split(), draw.randint(0, 12))} for _ in range(150)]
        good = source(tmp_path, pairs(10), "good")
        outcome = normalize(tmp_path / "out", good, source(tmp_path, [*junk, "{", "[1]"], "junk", map_fn=map_fn))
        assert outcome.ledger["rows"]["in"] == 162
        assert "map_fn_error" not in outcome.ledger["rows"]["set_aside"]


class TestSides:
    def test_rows_keep_their_side_and_id_when_rows_are_added(self, tmp_path):
        normalize(tmp_path / "monday", source(tmp_path, pairs(100)), fraction=0.2)
        normalize(tmp_path / "tuesday", source(tmp_path, pairs(150, -50)), fraction=0.2, seed=7)
        for name in ("train", "heldout"):
            monday = {row["row_id"]: row["messages"] for row in side(tmp_path / "monday", name)}
            tuesday = {row["row_id"]: row["messages"] for row in side(tmp_path / "tuesday", name)}
            assert monday.items() <= tuesday.items()
        assert 10 <= len(side(tmp_path / "monday", "heldout")) <= 30

    def test_duplicates_stay_together(self, tmp_path):
        normalize(tmp_path / "out", source(tmp_path, [*pairs(50), *pairs(50)]))
        train, heldout = side(tmp_path / "out", "train"), side(tmp_path / "out", "heldout")
        assert not answers(train) & answers(heldout)
        assert len(train) + len(heldout) == 100

    def test_a_weight_of_an_answer_does_not_change_its_side(self, tmp_path):
        def rows(loss: bool) -> list:
            turns = [{"input": "A", "output": "B"}, {"input": "C", "output": "D", "output_with_loss": loss}]
            return [{"conversation": [{**turn, "system": f"{n}"} for turn in turns]} for n in range(40)]

        normalize(tmp_path / "out", source(tmp_path, rows(True), "one"), source(tmp_path, rows(False), "two"))
        systems = [{row["messages"][0]["content"] for row in side(tmp_path / "out", s)} for s in ("train", "heldout")]
        assert not systems[0] & systems[1]

    def test_a_held_out_data_set_gives_way_to_training(self, tmp_path):
        evaluation = source(tmp_path, pairs(10, 5), "evaluation", held_out=True)
        sources = (evaluation, source(tmp_path, pairs(10), "training"))
        outcome = normalize(tmp_path / "out", *sources, fraction=0, limit=0)
        assert answers(side(tmp_path / "out", "heldout")) == {f"A{n}" for n in range(10, 15)}
        assert outcome.ledger["rows"]["set_aside"] == {"also_in_training": 5}
        assert outcome.ledger["turns"] == {"in": 20, "out": 15, "set_aside": {"also_in_training": 5}}
        assert outcome.facts["quarantined_fraction"] == 0
        assert {row["reason"] for row in quarantine(tmp_path / "out")} == {"also_in_training"}

    def test_weight_keeps_a_fraction_by_content_and_seed(self, tmp_path):
        kept = []
        for seed in (0, 0, 1):
            out = tmp_path / f"out{len(kept)}"
            outcome = normalize(out, source(tmp_path, pairs(400), weight=0.25), seed=seed, limit=0)
            kept.append(answers(side(out, "train")) | answers(side(out, "heldout")))
            assert 70 <= outcome.ledger["rows"]["out"] <= 130
            assert quarantine(out) == []
            assert outcome.ledger["turns"]["set_aside"]["not_sampled"] == 400 - len(kept[-1])
        assert kept[0] == kept[1] != kept[2]

    def test_same_bytes_twice(self, tmp_path):
        rows = source(tmp_path, [*pairs(30), {"input": 1}])
        written = []
        for out in (tmp_path / "one", tmp_path / "two"):
            normalize(out, rows)
            written.append({p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()})
        assert written[0] == written[1]
        names = ["heldout/part-00000.parquet", "quarantine/part-00000.jsonl", "train/part-00000.parquet"]
        assert sorted(written[0]) == names


class TestLimits:
    def fail(self, tmp_path: Path, *sources: NormalizeSource, fraction: float = 0.5, limit: float = 0.05) -> str:
        with pytest.raises(DataError) as caught:
            normalize(tmp_path / "out", *sources, fraction=fraction, limit=limit)
        return str(caught.value)

    def test_too_many_rows_set_aside(self, tmp_path):
        rows = [*pairs(8), {"text": "x"}, {"text": "### Human: y"}]
        assert self.fail(tmp_path, source(tmp_path, rows)) == (
            "2 of 10 rows (20.0%) cannot be used; normalize.max_quarantined_fraction allows 5.0%.\n"
            "  2 missing_column, such as rows.jsonl row 9: no column 'input'; there are text\n"
            "Fix these rows, choose another map_fn for rows (now default; the columns of that row fit oasst1 or "
            "pretrain), or raise normalize.max_quarantined_fraction"
        )

    def test_no_shipped_map_fn_fits(self, tmp_path):
        assert "(now default; your own: path.py:function)" in self.fail(tmp_path, source(tmp_path, [{"q": 1}]))

    def test_a_small_data_set_of_no_use_is_not_overlooked(self, tmp_path):
        message = self.fail(tmp_path, source(tmp_path, pairs(99)), source(tmp_path, [{"text": "x"}], "small"))
        assert message.startswith("not one of the 1 rows of data set 'small' can be used.\n  1 missing_column")

    def test_no_training_rows(self, tmp_path):
        assert self.fail(tmp_path, source(tmp_path, [{"q": 1}]), limit=1).startswith("no training rows are left of 1.")
        held_out = source(tmp_path, pairs(3), held_out=True)
        assert self.fail(tmp_path, held_out).startswith("no training rows are left of 3.")

    def test_nothing_held_out(self, tmp_path):
        message = self.fail(tmp_path, source(tmp_path, pairs(3)), fraction=0)
        assert message.startswith("nothing is held out: none of 3 conversations")
        assert "raise eval_fraction, name eval_datasets, or add rows" in message

    def test_no_rows(self, tmp_path):
        nothing = NormalizeSource(rows=tmp_path, map_fn="default", name="nothing")
        assert self.fail(tmp_path, nothing).startswith("no row to normalize in nothing")
