"""An answer of which nothing is to be seen is an empty one."""

import pytest

from sft_core.errors import RowError
from sft_core.normalize import load_map_fn

INVISIBLE = ["\u200b", "\ufeff", "\u2060", "\u200d\u200c", " \u00ad\n", "\u3164", "\u2800", "\U000e0041", "\u202e"]
VISIBLE = ["0", "\u200bno", "\U0001f469\u200d\U0001f467", "\u0301a", "\u4e00", "\u0903", "-"]


@pytest.mark.parametrize("answer", INVISIBLE)
def test_an_invisible_answer_is_set_aside(answer: str) -> None:
    with pytest.raises(RowError, match="empty_answer: the answer in output is empty"):
        load_map_fn("alpaca")({"instruction": "say", "input": "", "output": answer})


@pytest.mark.parametrize("answer", VISIBLE)
def test_a_visible_one_stays_as_it_is(answer: str) -> None:
    row = {"instruction": "say", "input": "", "output": answer}
    assert load_map_fn("alpaca")(row)["conversation"][0]["output"] == answer
