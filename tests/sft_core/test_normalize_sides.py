"""normalize: sides that stay, whatever else comes and goes; weights."""

import random

import pyarrow.parquet as pq
import pytest

from sft_core import shard_rows
from sft_core.normalize import CONVERSATION_SCHEMA
from sft_core.shards import read_shard_list
from tests.sft_core.test_normalize import answers, contents, normalize, pairs, quarantine, side, source


@pytest.fixture
def short_shards(monkeypatch):
    """A shard for about twenty rows."""
    monkeypatch.setattr(shard_rows, "ROWS_PER_CUT", 16)
    monkeypatch.setattr(shard_rows, "LEAST_ROWS", 4)
    monkeypatch.setattr(shard_rows, "MOST_ROWS", 64)


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
        outcome = normalize(tmp_path / "out", source(tmp_path, [*pairs(50), *pairs(50)]))
        train, heldout = side(tmp_path / "out", "train"), side(tmp_path / "out", "heldout")
        assert not answers(train) & answers(heldout)
        assert len(train) == 2 * len(answers(train))
        assert len(answers(train)) + len(heldout) == 50
        assert outcome.ledger["rows"]["set_aside"] == {"repeated": len(heldout)}
        assert outcome.facts["quarantined_fraction"] == 0

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
        for out in (tmp_path / "one", tmp_path / "two"):
            normalize(out, rows)
        written = contents(tmp_path / "one")
        assert written == contents(tmp_path / "two")
        assert sorted(written) == [
            "candidates/part-00000.parquet",
            "heldout/part-00000.parquet",
            "quarantine/part-00000.jsonl",
            "refused/part-00000.jsonl",
            "shards.json",
            "signatures/part-00000.npy",
            "train/part-00000.parquet",
        ]
        loaded = pq.read_table(tmp_path / "one" / "heldout" / "part-00000.parquet")
        assert loaded.schema.equals(CONVERSATION_SCHEMA)

    @pytest.mark.parametrize("seed", range(5))
    def test_a_row_never_changes_sides(self, tmp_path, seed, short_shards):
        draw = random.Random(seed)
        rows, sides = pairs(300), {}
        for night in range(4):
            out = tmp_path / f"{night}"
            normalize(out, source(tmp_path, rows, f"night{night}"), fraction=0.3, seed=night, near=0.8)
            for name in ("train", "heldout"):
                for row in side(out, name):
                    assert sides.setdefault(row["row_id"], name) == name
            for _ in range(draw.randint(1, 3)):
                at = draw.randrange(len(rows))
                rows[at : at + draw.choice([0, 7])] = pairs(draw.randint(1, 20), 1000 * (night + 1))
        assert len(sides) > 300

    def test_a_weight_above_one_is_for_pack_to_repeat(self, tmp_path):
        for weight in (1.0, 2.5):
            normalize(tmp_path / f"{weight}", source(tmp_path, pairs(60), weight=weight))
            (shard,) = read_shard_list(tmp_path / f"{weight}")
            assert shard.place == {"files": ["rows.jsonl"], "first_row": 0, "dataset": "rows", "weight": weight}
        once, often = contents(tmp_path / "1.0"), contents(tmp_path / "2.5")
        assert once.pop("shards.json") != often.pop("shards.json")
        assert once == often
        assert len(side(tmp_path / "2.5", "train")) + len(side(tmp_path / "2.5", "heldout")) == 60
