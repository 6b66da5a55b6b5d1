"""The page is whole, loads nothing, and shows what rows hold as text."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from sft_core.evaluate import EvaluationReport, Score
from sft_core.register import Material, Terms, judge, render_page
from sft_core.register.charts import Interval, interval_chart, line_chart

HOSTILE = "<script>alert(1)</script></pre><img src=http://evil.example/x onerror=alert(2)>'\"&\x00\ud800"
VOID = {"meta", "br", "link", "img"}


class Reader(HTMLParser):
    """Collects tags, texts and attributes; fails on a tag that closes another."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def report(loss: float, answer: str | None) -> EvaluationReport:
    score = Score(
        row_id="0",
        dataset=HOSTILE,
        tags=[HOSTILE],
        encoding="same",
        tokens=10,
        correct_tokens=5,
        loss_sum=loss,
        num_bytes=10,
        prompt=HOSTILE,
        reference=HOSTILE,
        answer=answer,
        exact_match=None if answer is None else False,
    )
    rows = [replace(score, row_id=str(i), num_bytes=i + 1, tags=[HOSTILE] if i % 2 else []) for i in range(60)]
    return EvaluationReport(tuple(rows), harness={HOSTILE: 0.5})


def material(answer: str | None = HOSTILE) -> Material:
    reports = {"tuned": report(1.0, answer), "base": report(2.0, answer), "champion": report(1.5, answer)}
    return Material(
        title=HOSTILE,
        verdict=judge(*reports.values(), Terms()),
        reports=reports,
        training=[{"optimizer_step": i, "loss": 5.0 / i} for i in range(1, 1000)],
        ledgers={"normalize": {"rows": {"in": 10, "out": 7, "set_aside": {HOSTILE: 1, "empty_answer": 2}}}},
    )


@pytest.fixture(scope="module")
def page() -> str:
    return render_page(material())


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    return reader


def test_what_rows_hold_is_text_and_the_page_is_well_formed(page: str) -> None:
    reader = read(page)
    assert not {"script", "img", "link", "iframe"} & set(reader.tags)
    assert not {"src", "href", "onerror"} & {name for name, _ in reader.attributes}
    shown = "".join(reader.texts)
    assert shown.count("<script>alert(1)</script></pre><img src=http://evil.example/x") > 20
    page.encode("utf-8")


def test_the_page_has_every_part(page: str) -> None:
    shown = "".join(read(page).texts)
    for words in (
        "Promoted.",
        "The tuned model beats the base: loss 0.1000 against 0.2000 on 60 rows",
        "beats the champion",
        "slice answers up to",
        "optimizer step",
        "empty_answer 2",
        "no worse",
        "95 % interval",
    ):
        assert words in shown
    assert page.count("<svg") == 4


def test_equal_material_gives_equal_text_and_no_answers_are_said_to_be_none(page: str) -> None:
    assert render_page(material()) == page
    assert "No answers were generated" in render_page(material(answer=None))


def test_charts_are_xml_with_points_inside_the_frame() -> None:
    curve = ElementTree.fromstring(
        line_chart({"a<b": [(x, float("nan") if x == 3 else x * x) for x in range(5000)]}, "<x>", "&y")
    )
    line = curve.find("polyline")
    assert line is not None
    points = [tuple(map(float, point.split(","))) for point in line.attrib["points"].split()]
    assert len(points) <= 602
    assert all(0 <= x <= 680 and 0 <= y <= 220 for x, y in points)
    assert points[0][1] > points[-1][1]  # upwards on the screen
    chart = ElementTree.fromstring(
        interval_chart([Interval("a<b", 0.1, float("-inf"), 0.3, True), Interval("c", -0.2, -0.3, -0.1, False)], "g")
    )
    assert [mark.attrib["class"] for mark in chart.findall("circle")] == ["good", "bad"]
    assert "a<b" in [text.text for text in chart.findall("text")]
    assert "fewer than two" in line_chart({"a": [(1.0, 1.0)]}, "x", "y")


def test_loss_curves_are_as_logged_smoothed_and_held_out() -> None:
    training = [{"optimizer_step": i, "loss": 2.0 + (i % 2)} for i in range(1, 301)]
    training = [{**entry, "eval_loss": 2.25} if entry["optimizer_step"] % 50 == 0 else entry for entry in training]
    shown = render_page(replace(material(), training=training))
    curves = re.findall(r'<polyline class="curve (c\d)" points="([^"]+)"', shown)
    assert [(kind, len(points.split())) for kind, points in curves] == [("c0", 300), ("c1", 300), ("c2", 6)]
    assert "training, mean of 10" in shown
    heights = {point.split(",")[1] for point in curves[1][1].split()[10:]}
    assert heights == {"100.0"}  # half-way between 2 and 3: 190 and 10
    few = render_page(replace(material(), training=training[:5]))
    assert re.findall(r'<polyline class="curve (c\d)"', few) == ["c1"]  # nothing to smooth: one line, in full colour
