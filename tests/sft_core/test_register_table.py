"""What a person reads before approving: the gate's figures, in Markdown that rows cannot break; and the words of it."""

from dataclasses import replace
from xml.etree import ElementTree

import pytest

from sft_core.errors import RecipeError
from sft_core.recipe import resolve
from sft_core.register import SliceResult, Terms, judge, verdict_table
from sft_core.register.charts import line_chart
from tests.sft_core.test_register import report

BETTER = judge(report([1.0] * 12), report([2.0] * 12), None, Terms(), trained_on=["r0", "r1"])


def test_the_figures_stand_in_one_line_a_comparison() -> None:
    head, _, table = verdict_table(BETTER).partition("\n\n")
    assert head == "**The gate promotes it.**"
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[:3]]
    assert dict(zip(cells[0], cells[2], strict=True)) == {
        "against": "base",
        "metric": "loss",
        "tuned": "1.0000",
        "the other": "2.0000",
        "gain, 95 % interval": "+1.0000 (+1.0000 to +1.0000)",
        "p (needed)": "0.00098 (0.015)",
        "rows": "10",
        "left out": "2",
    }
    assert "\n- 2 held-out rows left out: a model judged, or its ancestor, was trained on them" in table


def test_where_a_person_decides_nothing_is_said_to_be_promoted() -> None:
    manual = replace(BETTER, manual=True)
    assert manual.words.startswith("passed the gate: beats the base")
    assert verdict_table(manual).startswith("**The gate would promote it.**")
    assert replace(manual, promote=False).words.startswith("not promoted: ")


def test_what_rows_hold_is_text() -> None:
    hostile = "<img src=x>\n# **a**|[b](http://evil.example)`"
    slices = (SliceResult(name=hostile, rows=30, gain=-1, low=-2, high=-0.5, margin=0.1, outcome="worse"),)
    text = verdict_table(replace(BETTER, promote=False, slices=slices))
    assert "- slice \\<img src=x\\> # \\*\\*a\\*\\*\\|\\[b\\](http\\://evil.example)\\` (30 rows): worse" in text


def test_a_loss_that_falls_far_is_drawn_on_a_logarithmic_axis() -> None:
    far, near = (ElementTree.fromstring(line_chart({"a": [(0, y), (1, 1.0), (2, 0.1)]}, "x", "y")) for y in (10.0, 2.0))
    assert "y (log scale)" in [text.text for text in far.findall("text")]
    assert "y" in [text.text for text in near.findall("text")]
    line = far.find("polyline")
    assert line is not None
    heights = [float(point.split(",")[1]) for point in line.attrib["points"].split()]
    assert heights[1] == pytest.approx((heights[0] + heights[2]) / 2, abs=0.1)  # 10, 1, 0.1


def test_a_reference_needs_a_bucket() -> None:
    recipe = {"name": "a", "base_model": {"path": "b"}, "datasets": [{"path": "c"}], "register": {"by_reference": True}}
    for store in ("./store", "/data/store", "file:///data/store"):
        with pytest.raises(RecipeError, match="by_reference is true and the store .*store is a folder"):
            resolve({**recipe, "store": store})
    assert resolve({**recipe, "store": "s3://bucket/store"}).register_.by_reference
