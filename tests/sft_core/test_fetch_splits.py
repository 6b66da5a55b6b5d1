"""Which files of a folder belong to a split: a table of names, compared with what `datasets` makes of them."""

import doctest
import json
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict, NamedSplit
from datasets.data_files import DataFilesPatternsDict, get_data_patterns

from sft_core.errors import SourceError
from sft_core.fetch import describe_source, fetch_dataset, read_shards, splits
from sft_core.recipe import DatasetConfig

FOLDERS = {
    "names": {
        "train.jsonl": "train",
        "validation.jsonl": "validation",
        "test.jsonl": "test",
    },
    "other words": {"training.jsonl": "train", "dev.jsonl": "validation", "evaluation.jsonl": "test"},
    "short words": {"my-train-2.jsonl": "train", "my.val.jsonl": "validation", "my_eval_.jsonl": "test"},
    "digits": {"train1.jsonl": "train", "2valid.jsonl": "validation", "a0testing9b.jsonl": "test"},
    "folders": {"train/a.jsonl": "train", "dev/b.jsonl": "validation", "test/c.jsonl": "test"},
    "folders of folders": {"x/train_1/a.jsonl": "train", "x/y 2.train/b.jsonl": "train", "x/my-test/z/c.jsonl": "test"},
    "a folder's name before a file's": {"train/test.jsonl": "train", "test/train.jsonl": "test"},
    "shards": {
        "data/train-00000-of-00002.jsonl": "train",
        "data/train-00001-of-00002.jsonl": "train",
        "data/test_sft-00000-of-00001.jsonl": "test_sft",
    },
    "no split": {"a.jsonl": "train", "b/c.jsonl": "train", "contest.jsonl": "train", "trainer.jsonl": "train"},
    "words inside of words": {"latest.jsonl": "train", "retrain.jsonl": "train", "values.jsonl": "train"},
}


def make(folder: Path, labels: object) -> Path:
    for label in labels:
        (folder / label).parent.mkdir(parents=True, exist_ok=True)
        (folder / label).write_text(json.dumps({"a": label}))
    return folder


def fetch(path: Path, split: str = "train") -> list[str]:
    out = path.parent / f"out-{split}"
    fetch_dataset(DatasetConfig(path=str(path), split=split), out)
    return [json.loads(row["row"])["a"] for row in read_shards(out / "rows")]


def refusal(path: Path, split: str = "train") -> str:
    with pytest.raises(SourceError) as caught:
        describe_source(DatasetConfig(path=str(path), split=split))
    return str(caught.value)


class TestFolders:
    @pytest.mark.parametrize("name", FOLDERS)
    def test_as_datasets_does(self, tmp_path, name):
        folder, expected = make(tmp_path / "rows", FOLDERS[name]), FOLDERS[name]
        patterns = DataFilesPatternsDict.from_patterns(get_data_patterns(str(folder)))
        theirs = patterns.resolve(str(folder))
        there = {Path(path).relative_to(folder).as_posix(): split for split, paths in theirs.items() for path in paths}
        assert there == expected
        for split in {*expected.values()}:
            assert fetch(folder, split) == sorted(label for label in expected if expected[label] == split)

    def test_a_split_that_is_not_there(self, tmp_path):
        folder = make(tmp_path / "rows", ["test.jsonl", "dev/a.jsonl", "dev/b.jsonl", "dev/c.jsonl", "dev/d.jsonl"])
        error = refusal(folder)
        assert "no file of the split 'train'" in error
        assert "validation (dev/a.jsonl, dev/b.jsonl, dev/c.jsonl and 1 more); test (test.jsonl)" in error
        assert fetch(folder, "test") == ["test.jsonl"]
        plain = make(tmp_path / "plain", ["a.jsonl", "b.jsonl"])
        assert "no file of the split 'test'" in refusal(plain, "test")
        assert "There are: train (a.jsonl, b.jsonl)" in refusal(plain, "train[:10%]")

    def test_a_file_without_a_split_beside_others_is_named(self, tmp_path):
        folder = make(tmp_path / "rows", ["train.jsonl", "test.jsonl", "holdout.jsonl"])
        assert "some files' names tell their split, holdout.jsonl not" in refusal(folder)

    def test_a_file_of_two_splits_is_named(self, tmp_path):
        folder = make(tmp_path / "rows", ["train.jsonl", "test_train.jsonl"])
        assert "the name of test_train.jsonl tells train and test" in refusal(folder)

    def test_case_does_not_count(self, tmp_path):
        folder = make(tmp_path / "rows", ["Train.jsonl", "TEST.jsonl"])
        assert (fetch(folder), fetch(folder, "test")) == (["Train.jsonl"], ["TEST.jsonl"])

    def test_folders_and_names_together(self, tmp_path):
        folder = make(tmp_path / "rows", ["train/a.jsonl", "train/eval.jsonl", "test.jsonl"])
        assert fetch(folder) == ["train/a.jsonl", "train/eval.jsonl"]
        assert fetch(folder, "test") == ["test.jsonl"]

    def test_files_and_patterns_are_what_they_are(self, tmp_path):
        folder = make(tmp_path / "rows", ["train.jsonl", "test.jsonl"])
        assert fetch(folder / "test.jsonl") == ["test.jsonl"]
        assert fetch(Path(f"{folder}/*.jsonl")) == ["test.jsonl", "train.jsonl"]

    def test_the_identity_is_that_of_the_split_s_files(self, tmp_path):
        one = make(tmp_path / "one", ["train.jsonl", "test.jsonl"])
        parts = describe_source(DatasetConfig(path=str(one))).parts
        assert parts == describe_source(DatasetConfig(path=str(one / "train.jsonl"))).parts
        (one / "test.jsonl").write_text("{}")
        assert describe_source(DatasetConfig(path=str(one))).parts == parts


CARDS = {
    "list": "configs:\n- config_name: default\n  data_files:\n  - {split: train, path: a.jsonl}\n"
    "  - {split: test, path: [b.jsonl, 'c/*']}\n",
    "mapping": "configs:\n- data_files: {train: a.jsonl, test: [b.jsonl, 'c/**']}\n",
    "several, one the default": "configs:\n- {config_name: x, data_files: b.jsonl}\n"
    "- config_name: y\n  default: true\n  data_files:\n  - {split: train, path: 'a.*'}\n"
    "  - {split: test, path: [b.jsonl, c/d.jsonl]}\n",
}


class TestCard:
    LABELS = ("a.jsonl", "b.jsonl", "c/d.jsonl")

    @pytest.mark.parametrize("name", CARDS)
    def test_what_the_card_lists(self, tmp_path, name):
        folder = make(tmp_path / "rows", self.LABELS)
        (folder / "README.md").write_text(f"---\nlicense: mit\n{CARDS[name]}---\n# Rows\n")
        assert (fetch(folder), fetch(folder, "test")) == (["a.jsonl"], ["b.jsonl", "c/d.jsonl"])
        assert "There are: train (a.jsonl); test (b.jsonl, c/d.jsonl)" in refusal(folder, "validation")

    def test_a_configuration_by_name(self, tmp_path):
        folder = make(tmp_path / "rows", self.LABELS)
        card = "configs:\n- {config_name: x, data_files: a.jsonl}\n- {config_name: y, data_files: [b.jsonl]}\n"
        (folder / "README.md").write_text(f"---\n{card}---\n")
        assert "lists the configurations x, y; set `name` to one of them, or name" in refusal(folder)
        fetch_dataset(DatasetConfig(path=str(folder), name="y"), tmp_path / "out")
        assert [row["file"] for row in read_shards(tmp_path / "out" / "rows")] == ["b.jsonl"]

    @pytest.mark.parametrize(
        "card",
        [
            "# Rows",
            "---\n: [\n---\n",
            "---\nconfigs: 7\n---\n",
            "---\nconfigs:\n- data_dir: c\n---\n",
            "---\n[]\n---\n",
        ],
    )
    def test_other_readmes(self, tmp_path, card):
        folder = make(tmp_path / "rows", self.LABELS)
        (folder / "README.md").write_text(card)
        assert fetch(folder) == list(self.LABELS)

    def test_files_outside_of_the_folder_are_never_read(self, tmp_path):
        folder = make(tmp_path / "rows", ["a.jsonl"])
        make(tmp_path, ["secret.jsonl"])
        (folder / "README.md").write_text("---\nconfigs:\n- data_files: [a.jsonl, ../secret.jsonl]\n---\n")
        assert fetch(folder) == ["a.jsonl"]


class TestSaved:
    def save(self, folder: Path, value: str, split: str | None = None) -> None:
        Dataset.from_list([{"a": value}], split=NamedSplit(split) if split else None).save_to_disk(str(folder))

    def test_splits_side_by_side_without_a_dict(self, tmp_path):
        for split in ("train", "test"):
            self.save(tmp_path / "rows" / split, split)
        assert (fetch(tmp_path / "rows"), fetch(tmp_path / "rows", "test")) == (["train"], ["test"])

    def test_what_saved_ones_say_where_no_name_tells(self, tmp_path):
        self.save(tmp_path / "rows" / "a", "a", "train")
        self.save(tmp_path / "rows" / "b", "b", "test")
        self.save(tmp_path / "rows" / "c", "c")
        assert (fetch(tmp_path / "rows"), fetch(tmp_path / "rows", "test")) == (["a", "c"], ["b"])

    def test_one_that_is_named_itself(self, tmp_path):
        self.save(tmp_path / "rows", "a", "test")
        assert fetch(tmp_path / "rows") == fetch(tmp_path / "rows", "test") == ["a"]
        assert "no file of the split 'validation'" in refusal(tmp_path / "rows", "validation")

    def test_a_dict_of_any_names(self, tmp_path):
        sides = {name: Dataset.from_list([{"a": name}]) for name in ("train", "test_sft", "other")}
        DatasetDict(sides).save_to_disk(str(tmp_path / "rows"))
        assert [fetch(tmp_path / "rows", name) for name in sides] == [["train"], ["test_sft"], ["other"]]
        assert "without the split 'test'" in refusal(tmp_path / "rows", "test")


def test_doctests():
    assert doctest.testmod(splits).failed == 0
