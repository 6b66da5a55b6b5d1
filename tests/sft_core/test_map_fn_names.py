"""From the name of a map_fn to the function, and to its identity for the fingerprint."""

import doctest
import sys
from pathlib import Path

import pytest

from sft_core.errors import RecipeError
from sft_core.fingerprint import hash_value
from sft_core.normalize import (
    MAP_FNS,
    MAP_FNS_VERSION,
    identity,
    load,
    load_map_fn,
    map_fn_source,
)


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

def helper(text):
    return text[:LIMIT]

def unrelated(text):
    return 1

def read(row):
    return {"text": turn(texts.clean(helper(row["q"]))) + n.NAME + str(TABLE)}

if __name__ == "__main__":
    read({})
"""
    TEXTS = "import re\nMARK = 'm'\ndef clean(text): return re.sub(MARK, '', text)\ndef other(): return 1\n"

    def identity(self, root: Path, mine: str = MINE, texts: str = TEXTS, shapes: str = "def turn(t): return t") -> dict:
        (root / "project").mkdir(exist_ok=True, parents=True)
        for name, code in {"texts": texts, "shapes": shapes, "names": "NAME = 'x'\nOTHER = 1"}.items():
            (root / "project" / f"{name}.py").write_text(code)
        (root / "mine.py").write_text(mine)
        return map_fn_source(f"{root / 'mine.py'}:read")

    def test_what_is_part_of_it(self, tmp_path):
        code = self.identity(tmp_path)["code"]
        assert sorted(code) == [
            ":LIMIT",
            ":TABLE",
            ":helper",
            ":n",
            ":read",
            ":texts",
            "project.names:NAME",
            "project.shapes:turn",
            "project.texts:MARK",
            "project.texts:clean",
            "project.texts:re",
        ]

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ("return text[:LIMIT]", "return text[1:LIMIT]"),
            ("LIMIT = 3", "LIMIT = 4"),
            ('TABLE["a"] = 1', 'TABLE["a"] = 2'),
            ("import project.texts as texts", "import project.shapes as texts"),
        ],
    )
    def test_what_it_uses_counts(self, tmp_path, old, new):
        assert old in self.MINE
        assert self.identity(tmp_path) != self.identity(tmp_path, self.MINE.replace(old, new))

    def test_what_it_uses_in_other_modules_counts(self, tmp_path):
        before = self.identity(tmp_path)
        assert before != self.identity(tmp_path, texts=self.TEXTS.replace("'m'", "'k'"))
        assert before != self.identity(tmp_path, shapes="def turn(t): return t + t")

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ("return 1", "return 2"),
            ("LIMIT = 3", "LIMIT   =   3  # characters"),
            ("    return text[:LIMIT]", "    '''Cut it.'''\n\n    return text[:LIMIT]"),
            ("    read({})", "    read({'q': 1})"),
            ("import json", "import csv"),
        ],
    )
    def test_what_it_does_not_use_does_not_count(self, tmp_path, old, new):
        assert old in self.MINE
        assert self.identity(tmp_path) == self.identity(tmp_path, self.MINE.replace(old, new))
        assert self.identity(tmp_path) == self.identity(tmp_path, texts=self.TEXTS.replace("return 1", "return 2"))

    def test_relative_imports_packages_and_fallbacks(self, tmp_path, monkeypatch):
        code = {
            "pkg/__init__.py": "",
            "pkg/rows.py": "from . import marks\nfrom .sub.deep import cut as c\n"
            "try:\n    import ujson as js\nexcept ImportError:\n    import json as js\n"
            "def read(row):\n    return {'text': c(marks.A) + js.dumps(row)}\n",
            "pkg/marks.py": "A = 'a'\nB = 'b'\n",
            "pkg/sub/__init__.py": "",
            "pkg/sub/deep.py": "from ..marks import B\ndef cut(t): return t.strip(B)\n",
        }
        for name, text in code.items():
            (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
            (tmp_path / name).write_text(text)
        monkeypatch.chdir(tmp_path)
        assert sorted(map_fn_source("pkg.rows:read")["code"]) == [
            ":c",
            ":js",
            ":marks",
            ":read",
            "pkg.marks:A",
            "pkg.marks:B",
            "pkg.sub.deep:B",
            "pkg.sub.deep:cut",
        ]

    def test_places_do_not_count(self, tmp_path, monkeypatch):
        here = self.identity(tmp_path / "one")
        assert here == self.identity(tmp_path / "two")
        monkeypatch.chdir(tmp_path / "two")
        assert map_fn_source("mine:read") == map_fn_source("mine.py:read") == here

    def test_it_is_the_same_on_every_python(self, tmp_path):
        (tmp_path / "a.py").write_text(
            "def read(row, *, k=None):\n    return {'text': f'{row[0]!r:>{k}}' + u'\\u4f60'}\n"
        )
        identity = hash_value(map_fn_source(f"{tmp_path / 'a.py'}:read"))
        assert identity == "a4b0fc3159acb745cd6f19a801d5593c63528f4260813907f17261318bd3f451"

    def test_shipped_names(self):
        assert map_fn_source("alpaca_map_fn") == {"name": "alpaca", "version": MAP_FNS_VERSION}

    @pytest.mark.parametrize("name", ["alpacca", "nosuch.py:read", "nosuch.module:read"])
    def test_faults(self, name):
        with pytest.raises(RecipeError, match=name.partition(":")[0]):
            map_fn_source(name)

    def test_a_file_that_is_not_python(self, tmp_path):
        (tmp_path / "a.py").write_text("def read(row)\n")
        with pytest.raises(RecipeError, match=r"a\.py, line 1: not Python"):
            map_fn_source(f"{tmp_path / 'a.py'}:read")


def test_doctests():
    for module in (load, identity):
        assert doctest.testmod(module).failed == 0
