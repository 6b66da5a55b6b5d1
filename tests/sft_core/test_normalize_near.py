"""normalize: near duplicates of training rows leave the held-out side, and nothing else does."""

import random
from pathlib import Path

import numpy as np
import pytest

from sft_core.normalize import NormalizeSource, near_duplicates
from sft_core.normalize.near_duplicates import HeldOutSignatures, Match, band_width
from sft_core.normalize.sketch import BINS, similarity
from tests.sft_core.test_normalize import normalize, quarantine, side, source

WORDS = [f"{a}{b}" for a in "ba ke li mo nu pra ste vor".split() for b in "do fen gi lar mus tik".split()]


def long_rows(count: int, seed: int = 0) -> list[dict]:
    """Conversations of about 400 characters that have no more in common than the language."""
    draw = random.Random(seed)
    return [
        {"input": f"Say {n}", "output": " ".join(draw.choices(WORDS, k=60)).capitalize() + "."} for n in range(count)
    ]


def edited(row: dict) -> dict:
    """Other case, other marks, a word less."""
    return {**row, "output": row["output"].upper().replace(".", "!").replace(" ", ",  ").rpartition(" ")[0]}


def sources(tmp_path: Path, training: list, evaluation: list) -> tuple[NormalizeSource, NormalizeSource]:
    return source(tmp_path, training), source(tmp_path, evaluation, "evaluation", held_out=True)


class TestStep:
    def test_planted_ones_are_set_aside_and_counted(self, tmp_path):
        training = long_rows(200)
        evaluation = [*long_rows(20, seed=1), *map(edited, training[50:60]), *training[:3]]
        given = sources(tmp_path, training, evaluation)
        outcome = normalize(tmp_path / "out", *given, fraction=0, limit=0, near=0.8)
        assert outcome.ledger["rows"]["set_aside"] == {"also_in_training": 3, "near_duplicate": 10}
        assert outcome.facts["datasets"]["evaluation"]["heldout"] == 20
        assert outcome.facts["train_rows"] == 200
        assert outcome.facts["quarantined_fraction"] == 0
        aside = {row["row_number"]: row for row in quarantine(tmp_path / "out")}
        assert list(aside) == list(range(21, 34))
        for place in range(10):
            assert f"with rows.jsonl row {51 + place} of rows" in aside[21 + place]["detail"]
            assert f'"content": "Say {50 + place}"' in aside[21 + place]["row"]

    def test_null_switches_it_off(self, tmp_path):
        training = long_rows(30)
        given = sources(tmp_path, training, [edited(row) for row in training])
        outcome = normalize(tmp_path / "out", *given, fraction=0, limit=0, near=None)
        assert outcome.ledger["rows"]["set_aside"] == {}
        assert outcome.facts["heldout_rows"] == 30

    def test_one_that_comes_later(self, tmp_path):
        rows = long_rows(60)
        normalize(tmp_path / "monday", source(tmp_path, rows), fraction=0.5, near=0.8)
        monday = side(tmp_path / "monday", "heldout")
        assert len(monday) > 15
        held = {row["messages"][0]["content"] for row in monday}
        new = [edited(row) for row in rows if row["input"] in held]
        normalize(tmp_path / "tuesday", source(tmp_path, [*rows, *new]), fraction=0.5, near=0.8)
        left = {row["row_id"] for row in side(tmp_path / "tuesday", "heldout")}
        trained = {row["row_id"] for row in side(tmp_path / "tuesday", "train")}
        gone = {row["row_id"] for row in monday} - left
        assert len(gone) > 3
        assert not gone & trained
        assert trained >= {row["row_id"] for row in side(tmp_path / "monday", "train")}

    def test_the_system_prompt_does_not_count(self, tmp_path):
        prompt = " ".join(random.Random(5).choices(WORDS, k=2000))
        rows = [{"conversation": [{**row, "system": prompt}]} for row in long_rows(60)]
        outcome = normalize(tmp_path / "out", source(tmp_path, rows), near=0.8)
        assert side(tmp_path / "out", "train")[0]["messages"][0]["content"] == prompt
        assert outcome.ledger["rows"]["set_aside"] == {}

    def test_short_rows_are_near_only_what_reads_the_same(self, tmp_path):
        training = [{"input": f"What is 2 plus {n}?", "output": f"It is {n + 2}."} for n in range(50)]
        others = [{"input": f"What is 3 plus {n}?", "output": f"It is {n + 3}."} for n in range(50)]
        same = [{"input": f"what is  2 plus {n}", "output": f"It is {n + 2}!"} for n in range(50)]
        given = sources(tmp_path, training, [*others, *same])
        outcome = normalize(tmp_path / "out", *given, fraction=0, near=0.8)
        assert outcome.ledger["rows"]["set_aside"] == {"near_duplicate": 50}
        assert {row["messages"][0]["content"][8] for row in side(tmp_path / "out", "heldout")} == {"3"}


def planted(count: int, equal_bins: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of random signatures that agree in so many bytes and no other."""
    draw = np.random.default_rng(seed)
    training = draw.integers(0, 256, (count, BINS)).astype(np.uint8)
    held_out = training + draw.integers(1, 256, (count, BINS)).astype(np.uint8)
    kept = draw.permuted(np.tile(np.arange(BINS) < equal_bins, (count, 1)), axis=1)
    held_out[kept] = training[kept]
    return held_out, training


class TestMatches:
    @pytest.mark.parametrize("threshold", [0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    def test_nearly_all_at_the_threshold_are_found(self, threshold):
        equal = int(np.ceil(BINS * (threshold + (1 - threshold) / 256)))
        held_out, training = planted(2000, equal, seed=0)
        found = list(HeldOutSignatures(held_out, threshold).matches(training))
        assert len(found) >= 0.98 * 2000
        expected = float(similarity(np.array([equal]))[0])
        assert all(match == Match(match.training, match.training, expected) for match in found)
        held_out, training = planted(2000, equal - 1, seed=1)
        assert not list(HeldOutSignatures(held_out, threshold).matches(training))

    @pytest.mark.parametrize("pairs", [1, 50, 1 << 20])
    def test_crowds(self, monkeypatch, pairs):
        monkeypatch.setattr(near_duplicates, "MOST_PAIRS", pairs)
        held_out, training = planted(40, 115, seed=2)
        crowd = np.concatenate([held_out, held_out, held_out])
        index = HeldOutSignatures(crowd, 0.8)
        found = {match.held_out: match.training for match in index.matches(np.concatenate([training, training]))}
        assert found == {place: place % 40 for place in range(120)}
        assert not list(index.matches(training))

    def test_shard_by_shard(self):
        held_out, training = planted(300, 120, seed=3)
        index = HeldOutSignatures(held_out, 0.8)
        found = [m.held_out for start in range(0, 300, 7) for m in index.matches(training[start : start + 7])]
        assert found == list(range(300))

    def test_the_nearest_is_named(self):
        training = planted(5, 0, seed=4)[1]
        held_out = training[:1].copy()
        for row, differing in enumerate([12, 9, 3, 7, 15]):
            training[row] = held_out[0]
            training[row, :differing] += 1
        (match,) = HeldOutSignatures(held_out, 0.8).matches(training)
        assert match.training == 2

    def test_nothing_on_a_side(self):
        held_out, training = planted(3, BINS, seed=5)
        assert not list(HeldOutSignatures(held_out[:0], 0.8).matches(training))
        assert not list(HeldOutSignatures(held_out, 0.8).matches(training[:0]))

    def test_bands_grow_with_the_threshold(self):
        widths = [band_width(threshold) for threshold in np.linspace(0.05, 1, 20)]
        assert widths == sorted(widths)
        assert set(widths) <= set(range(2, 9))
