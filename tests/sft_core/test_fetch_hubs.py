"""fetch: openMind and ModelScope, with packages of their names and call signatures in a folder on `sys.path`."""

import json
import sys
from pathlib import Path

import pytest

from sft_core.errors import SourceError
from sft_core.fetch import describe_source, fetch_dataset, read_shards
from sft_core.recipe import DatasetConfig

OPENMIND = """
import json, pathlib
from datasets import Dataset, DatasetDict

class OmDataset:
    @staticmethod
    def load_dataset(path=None, name=None, data_dir=None, data_files=None, split=None, revision=None):
        here = pathlib.Path(__file__).parent
        (here / "asked.json").write_text(json.dumps([path, name, split, revision]))
        rows = json.loads((here / "rows.json").read_text())
        if split not in ("train", "all"):
            raise ValueError(f"Unknown split {split!r}")
        return Dataset.from_list(rows) if split == "train" else DatasetDict({"train": Dataset.from_list(rows)})
"""
MODELSCOPE = """
import json, pathlib
from datasets import Dataset

class MsDataset:
    def __init__(self, rows):
        self.rows = rows

    @staticmethod
    def load(dataset_name, namespace="modelscope", target=None, version="master", subset_name=None, split=None):
        here = pathlib.Path(__file__).parent.parent.parent
        (here / "asked.json").write_text(json.dumps([dataset_name, subset_name, split, version]))
        return MsDataset(json.loads((here / "rows.json").read_text()))

    def to_hf_dataset(self):
        return Dataset.from_list(self.rows)
"""
ROWS = [{"b": "\u4f60", "a": 1}, {"b": None, "a": 2}]
TEXTS = ['{"b": "\u4f60", "a": 1}', '{"b": null, "a": 2}']


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A folder on `sys.path` with both packages and the rows that they give."""
    folder = tmp_path / "site"
    (folder / "modelscope" / "msdatasets").mkdir(parents=True)
    (folder / "openmind.py").write_text(OPENMIND)
    (folder / "modelscope" / "__init__.py").write_text("")
    (folder / "modelscope" / "msdatasets" / "__init__.py").write_text(MODELSCOPE)
    (folder / "rows.json").write_text(json.dumps(ROWS))
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    for name in ("openmind", "modelscope", "modelscope.msdatasets"):
        sys.modules.pop(name, None)


def dataset(source: str, **keys: str) -> DatasetConfig:
    return DatasetConfig(path="owner/rows", source=source, **keys)


class TestOtherHubs:
    @pytest.mark.parametrize("source", ["openmind", "modelscope"])
    def test_rows(self, packages, tmp_path, source):
        outcome = fetch_dataset(dataset(source), tmp_path / "out")
        assert [tuple(row.values()) for row in read_shards(tmp_path / "out" / "rows")] == [
            (TEXTS[0], "owner/rows:train", 1, None),
            (TEXTS[1], "owner/rows:train", 2, None),
        ]
        assert outcome.ledger["rows"] == {"in": 2, "out": 2, "set_aside": {}}

    @pytest.mark.parametrize(("source", "default"), [("openmind", None), ("modelscope", "master")])
    def test_keys_arrive_and_unset_ones_stay_the_packages_own(self, packages, source, default):
        describe_source(dataset(source, name="en", revision="v1"))
        assert json.loads((packages / "asked.json").read_text()) == ["owner/rows", "en", "train", "v1"]
        describe_source(dataset(source))
        assert json.loads((packages / "asked.json").read_text()) == ["owner/rows", None, "train", default]

    def test_identity_is_the_rows(self, packages):
        before = describe_source(dataset("openmind")).parts
        assert list(before) == ["rows_sha256"]
        assert describe_source(dataset("modelscope", revision="v1")).parts == before
        (packages / "rows.json").write_text(json.dumps([{**ROWS[0], "a": 3}, ROWS[1]]))
        assert describe_source(dataset("openmind")).parts != before

    def test_rows_that_change_meanwhile(self, packages, tmp_path):
        expected = describe_source(dataset("openmind"))
        (packages / "rows.json").write_text(json.dumps(ROWS[:1]))
        with pytest.raises(SourceError, match=r"owner/rows \(openmind, split 'train'\) changed since"):
            fetch_dataset(dataset("openmind"), tmp_path / "out", expected)

    def test_what_cannot_be_loaded(self, packages):
        with pytest.raises(
            SourceError, match="split 'dev'.*: cannot be loaded: ValueError: Unknown split 'dev'. Check"
        ):
            describe_source(dataset("openmind", split="dev"))
        with pytest.raises(SourceError, match="not one split but several: train; name one"):
            describe_source(dataset("openmind", split="all"))

    @pytest.mark.parametrize(
        ("source", "command"),
        [("openmind", "pip install openmind"), ("modelscope", r"pip install 'modelscope\[datasets\]'")],
    )
    def test_a_package_that_is_not_there(self, source, command):
        with pytest.raises(SourceError, match=f"owner/rows .*{source}.* cannot be imported here.*; {command}"):
            describe_source(dataset(source))


def test_a_hub_id_that_is_also_a_folder(tmp_path, monkeypatch):
    (tmp_path / "owner" / "rows").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    source = describe_source(dataset("hub", revision="d" * 40))
    assert source.parts == {"hub": "owner/rows", "name": None, "split": "train", "commit": "d" * 40}
    assert describe_source(DatasetConfig(path="owner/other", revision="d" * 40)).hub is not None


def test_images_of_a_data_set_stay_the_bytes_that_they_are(tmp_path):
    from datasets import Dataset, Features, Image, Value

    from sft_core.fetch.table_rows import number_dataset_rows

    features = Features({"image": Image(), "text": Value("string")})
    rows = Dataset.from_list([{"image": {"bytes": b"\xff\x00", "path": "a.png"}, "text": "x"}], features=features)
    (row,) = number_dataset_rows(rows)
    assert json.loads(row.row) == {"image": {"bytes": "/wA=", "path": "a.png"}, "text": "x"}
    assert row.problem is None


@pytest.mark.parametrize("mode", [None, "use_json"])
def test_nulls_that_a_data_set_filled_in_are_left_out_of_calls(mode):
    from datasets import Dataset

    from sft_core.fetch.table_rows import number_dataset_rows

    calls = [[{"name": "f", "arguments": {"a": "5"}}], [{"name": "g", "arguments": {"b": "x"}}]]
    rows = Dataset.from_list([{"messages": [{"tool_calls": call}]} for call in calls], on_mixed_types=mode)
    read = list(number_dataset_rows(rows))
    assert [json.loads(raw.row)["messages"][0]["tool_calls"] for raw in read] == calls
    assert [raw.dropped_nulls for raw in read] == ([1, 1] if mode is None else [0, 0])


def test_a_value_that_json_cannot_hold_is_a_problem_of_its_row():
    from sft_core.fetch.table_rows import number_rows

    good, bad = number_rows([{"a": 1}, {"a": object(), "b": "x"}])
    assert good == ('{"a": 1}', 1, None, 0)
    assert bad == (
        '{"a": null, "b": "x"}',
        2,
        "not_text: column 'a': a builtins.object, which JSON cannot hold",
        0,
    )


def test_paths_are_not_looked_up_where_a_hub_is_named(packages, tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n')
    parts = describe_source(DatasetConfig(path=str(tmp_path / "a.jsonl"), source="openmind")).parts
    assert list(parts) == ["rows_sha256"]
