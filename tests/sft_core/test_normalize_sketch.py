"""Signatures: the estimate against exact Jaccard similarity, what counts of a text, and that neighbours do not."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from sft_core.normalize import sketch as sketches
from sft_core.normalize.sketch import BINS, GRAM, SHORT, similarity, sketch, text_of

SHARED = Path(__file__).parents[2].parent / "shared" / "data" / "alpaca"
STANDARD_DEVIATION = np.sqrt(0.25 / BINS)
"""Of an estimate from BINS draws, at most."""


def exact(one: str, other: str) -> float:
    """Jaccard similarity of two texts' sets of n-grams."""
    first, second = ({text[at : at + GRAM] for at in range(len(text) - GRAM + 1)} for text in (one, other))
    return len(first & second) / len(first | second)


def estimated(ones: list[str], others: list[str]) -> np.ndarray:
    return similarity((sketch(ones) == sketch(others)).sum(axis=1))


def letters(draw: random.Random, count: int, alphabet: str = "abcdefghijklmnopqrstuvwxyz ") -> str:
    return "".join(draw.choices(alphabet, k=count))


@pytest.mark.parametrize("alphabet", ["abcdefghijklmnopqrstuvwxyz ", "一二三四五六七八九十百千万上下左右中大小", "ab"])
def test_the_estimate_is_close_to_exact_jaccard(alphabet):
    draw = random.Random(0)
    ones, others = [], []
    for _ in range(600):
        whole, rest = letters(draw, draw.randint(60, 2000), alphabet), letters(draw, 1000, alphabet)
        cut = draw.randint(0, len(whole))
        ones.append(whole)
        others.append(whole[:cut] + rest[: max(60, len(whole)) - cut])
    truth = np.array([exact(one, other) for one, other in zip(ones, others, strict=True)])
    error = estimated(ones, others) - truth
    assert truth.min() < 0.1 or len(alphabet) == 2
    assert truth.max() > 0.9
    assert abs(error.mean()) < 0.01
    assert np.sqrt((error**2).mean()) < STANDARD_DEVIATION
    assert abs(error).max() < 5 * STANDARD_DEVIATION


def test_a_text_is_sketched_alike_wherever_it_stands(monkeypatch):
    draw = random.Random(1)
    texts = [letters(draw, draw.choice([0, 1, 3, GRAM, SHORT, SHORT + GRAM - 1, 100, 700])) for _ in range(200)]
    together = sketch(texts)
    assert np.array_equal(together, np.concatenate([sketch([text]) for text in texts]))
    monkeypatch.setattr(sketches, "BLOCK_CHARACTERS", 50)
    assert np.array_equal(together, sketch(texts))
    assert sketch([]).shape == (0, BINS)


def test_no_bin_stays_empty():
    one_gram = "a" * 200
    assert len(np.unique(sketch([one_gram]))) == 1
    assert estimated([one_gram], ["b" * 200])[0] < 0.05


def test_short_texts_are_equal_or_not():
    base = "x" * (SHORT + GRAM - 2)
    assert estimated([base], [base])[0] == 1
    assert estimated([base], [base[:-1] + "y"])[0] < 0.05
    assert estimated([base], [base + "x"])[0] < 0.05


def test_what_counts_of_a_text():
    def text(*contents: str, role: str = "user") -> str:
        return text_of([{"role": role, "content": content, "weight": None} for content in contents])

    assert text("Ｈｅｌｌｏ,\n WORLD!", "Yes: 1.5") == "hello world yes 1 5"
    assert text("你好，世界。", "Straße") == "你好世界 strasse"
    assert text("Be good.", role="system") == ""
    call = {"role": "assistant", "content": "", "weight": 1, "tool_calls": '[{"name": "Add"}]'}
    assert text_of([call]) == '[{"name" "add"}]'
    assert len(text("a" * (sketches.MOST_CHARACTERS + 5))) == sketches.MOST_CHARACTERS


@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/data beside this checkout")
@pytest.mark.parametrize("file", ["alpaca_en_demo.json", "alpaca_zh_demo.json", "stanford_alpaca_6382-9407.json"])
def test_real_rows_are_not_near_one_another(file):
    rows = json.loads((SHARED / file).read_text("utf-8"))[:1000]
    contents = [[row["instruction"], row.get("input") or "", row["output"]] for row in rows]
    texts = sorted({text_of([{"role": "user", "content": c, "weight": None} for c in row]) for row in contents})
    signatures = sketch(texts)
    nearest = [similarity((signatures[:n] == signatures[n]).sum(axis=1)).max() for n in range(1, len(texts))]
    assert max(nearest) < 0.7
