"""From the name of a map_fn to the function, and to its identity for the fingerprint."""

import doctest
import json
import random
import sys
from pathlib import Path

import pytest

from sft_core.artifacts import Outcome, check_ledger
from sft_core.errors import DataError, RecipeError, RowError, SourceError
from sft_core.fetch import fetch_dataset, read_shards
from sft_core.fingerprint import hash_value
from sft_core.normalize import (
    MAP_FNS,
    MAP_FNS_VERSION,
    NormalizeSource,
    conversation,
    identity,
    load,
    load_map_fn,
    map_fn_source,
    normalize_dataset,
    to_messages,
)
from sft_core.recipe import DatasetConfig, NormalizeConfig



class TestLoad:
    def test_shipped_names(self):
        assert load_map_fn("alpaca") is load_map_fn("alpaca_map_fn") is MAP_FNS["alpaca"]
        assert load_map_fn("sft_core.normalize.map_fns:alpaca") is MAP_FNS["alpaca"]

    def test_a_file_and_its_neighbours_are_run_afresh(self, tmp_path, monkeypatch):
        before, path = set(sys.modules), list(sys.path)
        for number in (1, 2, 3):
            folder = tmp_path / ("one" if number < 3 else "two")
            folder.mkdir(exist_ok=True)
            (folder / "shapes_of_mine.py").write_text(
                f"def text(row):\n    return {{'text': row['q'], 'n': {number}}}\n"
            )
            (folder / "mine.py").write_text(
                "from shapes_of_mine import text\ndef read(row): return text(row) | {'m': 1}\n"
            )
            assert load_map_fn(f"{folder / 'mine.py'}:read")({"q": "x"}) == {"text": "x", "n": number, "m": 1}
        assert (set(sys.modules) - before, sys.path) == ({"map_fn_file_mine"} - before, path)

    def test_a_module_in_the_current_directory(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "rows_of_mine.py").write_text("def text(row):\n    return {'text': row['q']}\n")
        assert load_map_fn("rows_of_mine:text")({"q": "x"}) == {"text": "x"}
        monkeypatch.delitem(sys.modules, "rows_of_mine")

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("alpacca", "no map_fn is named 'alpacca'; did you mean 'alpaca'?; write a shipped name"),
            ("mine.py:raed", "mine.py has no function 'raed'; did you mean 'read'?"),
            ("mime.py:read", r"no file mime.py \(looked in .*\); did you mean 'mine.py'?"),
            ("mine.py:TABLE", "TABLE is a dict, not a function"),
            ("broken.py:read", "broken.py does not run: ZeroDivisionError"),
            ("nosuchmodule.rows:read", "no module 'nosuchmodule' here or installed"),
            ("mine.py:", "no map_fn is named 'mine.py:'"),
        ],
    )
    def test_faults(self, tmp_path, monkeypatch, name, message):
        monkeypatch.chdir(tmp_path)
        Path("mine.py").write_text("TABLE = {}\ndef read(row): ...\n")
        Path("broken.py").write_text("1 / 0\n")
        with pytest.raises(RecipeError, match=message.replace("?", r"\?")):
            load_map_fn(name)


class TestIdentity:
    MINE = """
import json
import project.texts as texts
from project import names as n
from project.shapes import *

LIMIT = 3
TABLE = {}
TABLE["a"] = 1

