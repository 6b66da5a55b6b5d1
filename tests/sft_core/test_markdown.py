"""Names of data sets, tags and files in Markdown: a reader sees them as they are.

The reader is markdown-it, which is not ours.
"""

import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest
from markdown_it import MarkdownIt

from sft_core.artifacts import Manifest
from sft_core.lineage.card import model_card
from sft_core.markdown import as_block, as_code, as_text
from sft_core.plan import Plan, PlannedStep
from sft_core.recipe import resolve
from sft_core.recipe.show import as_markdown
from sft_core.register import SliceResult, Terms, judge, verdict_table
from tasks.shown import report_text
from tests.sft_core.test_register import report

HOSTILE = [
    "**bold** __under__ _a_ ~~gone~~ *i*",
    "[a](http://evil.example) ![b](http://evil.example/x.png)",
    "<img src=x onerror=alert(1)><script>alert(1)</script>",
    "http://evil.example https://evil.example/a_b www.evil.example me@evil.example ftp://evil.example",
    "<http://evil.example> <me@evil.example>",
    "a|b || c | d",
    "`code` ``more` &amp; &#60; \\*",
    "# heading",
    "1. one",
    "2) two",
    "- item",
    "+ item",
    "=====",
    "> quote",
    "| a | b |",
    "```python",
    "~~~",
    "[x]: http://evil.example",
    "[^1] $x$ $$y$$",
    "bits_per_byte snake_case_ _lead trail_ a__b",
    "ok! ![ wow",
    "ends with \\",
    "\u4e2d\u6587 \U0001f469\u200d\U0001f52c \u0928\u092e\u0938\u094d\u0924\u0947",
]
PLAIN_TAGS = {"p", "ul", "li", "h1", "h2", "table", "thead", "tbody", "tr", "th", "td", "code", "strong", "pre"}


class Page(HTMLParser):
    """What a browser would show: the text, by element, and which elements there are."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def read(markdown: str) -> Page:
    """GitHub's dialect with HTML let through: the most that a viewer does."""
    return Page(MarkdownIt("gfm-like", {"html": True, "linkify": False}).render(markdown))


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("around", ["{}", "x {} y", "- {}", "# {}"])
def test_a_name_is_read_as_itself(name: str, around: str) -> None:
    page = read(around.format(as_text(name)))
    assert page.text.strip() == (f"x {name} y" if around.startswith("x") else name)
    assert page.tags in (["p"], ["h1"], ["ul", "li"])


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_in_a_cell_of_a_table_ends_no_cell(name: str) -> None:
    page = read(f"| a | b |\n|---|---|\n| {as_text(name)} | 1 |\n")
    assert page.tags == ["table", "thead", "tr", "th", "th", "tbody", "tr", "td", "td"]
    assert name in page.text


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_as_code_is_read_as_itself(name: str) -> None:
    page = read(f"x {as_code(name)} y")
    assert (page.text.strip(), page.tags) == (f"x {name} y", ["p", "code"])


def test_a_bare_address_becomes_no_link() -> None:
    """GitHub's extension of the specification: a link begins with one of these, or has an address of mail in it."""
    text = as_text("http://a.example https://a.example ftp://a.example www.a.example me@a.example")
    assert re.search(r"(https?|ftp)://|www\.|[\w.+-]@[\w-]", text) is None


def test_a_name_of_several_lines_is_one_line() -> None:
    assert as_text("a\n\n# b\t c\r\n- d\u2028e") == "a # b c - d e"
    assert as_text("\x1b[31mred\x07\u202egnp") == "\u241b\\[31mred\u2407\\\\u202egnp"


def test_a_block_of_code_is_not_ended_by_what_is_in_it() -> None:
    page = read(as_block("a: |\n  ```\n  # not a heading\n  ````\n", "yaml") + "\nbehind")
    assert page.tags == ["pre", "code", "p"]
    assert "# not a heading" in page.text


NAME = "[a](http://evil.example)|<b>**c**\n# `d` www.evil.example"
SEEN = "[a](http://evil.example)|<b>**c** # `d` www.evil.example"


def test_the_gates_table_the_report_and_the_card_show_a_slices_name_as_it_is() -> None:
    verdict = judge(report([1.0] * 12), report([2.0] * 12), None, Terms())
    slices = (SliceResult(name=NAME, rows=30, gain=-1, low=-2, high=-0.5, margin=0.1, outcome="worse"),)
    verdict = replace(verdict, promote=False, slices=slices)
    registered = {"model_name": "orders", "version": "3", "verdict": verdict.words}
    source = {"path": f"data/{NAME}.jsonl", "split": NAME, "map_fn": "alpaca"}
    recipe = resolve({"name": "orders", "base_model": {"path": NAME}, "datasets": [source]})
    plan = Plan({"fetch/0": PlannedStep("fetch/0", "0" * 64, {}, {})}, "", None)
    manifests: dict[str, Manifest] = {}
    texts = {
        "table": verdict_table(verdict),
        "report": report_text(registered, "", [], ""),
        "card": model_card(recipe, plan, manifests, verdict.words),
    }
    for which, text in texts.items():
        page = read(text)
        assert SEEN in page.text, which
        assert set(page.tags) <= PLAIN_TAGS, which
    assert read(texts["card"]).text.count(SEEN) == 4  # base, path, split, verdict
    assert read(as_markdown(recipe)).tags == ["h1", "pre", "code"]
