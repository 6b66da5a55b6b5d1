"""normalize: how many rows may be set aside, and what both sides need."""

import re
from pathlib import Path

import pytest

from sft_core.errors import DataError
from sft_core.normalize import NormalizeSource
from tests.sft_core.test_normalize import normalize, pairs, source


class TestLimits:
    def fail(self, tmp_path: Path, *sources: NormalizeSource, fraction: float = 0.5, limit: float = 0.05) -> str:
        with pytest.raises(DataError) as caught:
            normalize(tmp_path / "out", *sources, fraction=fraction, limit=limit)
        return str(caught.value)

    def test_too_many_rows_set_aside(self, tmp_path):
        rows = [*pairs(8), {"text": "x"}, {"text": "### Human: y"}]
        assert self.fail(tmp_path, source(tmp_path, rows)) == (
            "2 of 10 rows (20.0%) cannot be used; max_quarantined_fraction allows 5.0%.\n"
            "  2 missing_column, such as rows.jsonl row 9: no column 'input'; there are text\n"
            "Fix these rows, choose another map_fn for rows (now default; the columns of that row fit oasst1 or "
            "pretrain), or raise max_quarantined_fraction"
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

    def test_what_is_held_out_may_all_be_like_training(self, tmp_path):
        held_out = source(tmp_path, pairs(3), "evaluation", held_out=True)
        message = self.fail(tmp_path, source(tmp_path, pairs(3)), held_out, fraction=0)
        assert "all 3 held-out rows are set aside, as 3 rows of eval_datasets are in training too" in message

    def test_what_is_held_out_may_all_be_near_training(self, tmp_path):
        rows = [
            {"input": "Say it", "output": f"{'The same answer as always, word for word. ' * 9}{n}"} for n in range(60)
        ]
        with pytest.raises(DataError) as caught:
            normalize(tmp_path / "out", source(tmp_path, rows), fraction=0.3, near=0.8)
        message = str(caught.value)
        assert re.match(r"nothing is held out: all \d+ held-out rows are set aside, as \d+ rows are near dup", message)
        assert message.endswith("or raise normalize.near_duplicates (null keeps all but exact copies)")

    def test_no_rows(self, tmp_path):
        nothing = NormalizeSource(rows=tmp_path, map_fn="default", name="nothing")
        assert self.fail(tmp_path, nothing).startswith("no row to normalize in nothing")
