"""Short YAML that stands for much, is deep or is wrong: one error of one line, soon."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sft_core.errors import RecipeError
from sft_core.recipe import parse_settings, resolve
from sft_core.yaml_text import read_yaml

SECONDS = 120
"""Bound on a command that reads a recipe; 2 s are usual."""
LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n}\n  <<: [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))
WRONG = {
    "aliases": (LAUGHS, "more than 100,000 keys and values"),
    "merge keys": (MERGES, "more than 100,000 keys and values"),
    "itself": ("a: &a [*a]", "more than 100,000 keys and values"),
    "brackets": ("a: " + "[" * 400_000, "keys nested more than 100 deep"),
    "dashes": ("- " * 400_000, "keys nested more than 100 deep"),
    "lines": ("".join(f"{' ' * n}a:\n" for n in range(1_000)), "keys nested more than 100 deep"),
    "long": ("#" * 1_000_001, "1,000,001 characters, and 1,000,000 are the most"),
    "date": ("seed: 2026-99-99", "month must be in 1..12"),
    "digits": ("seed: " + "9" * 5_000, "Exceeds the limit"),
    "torn": ("a: [1,\nb: {", "while parsing a flow"),
    "tag": ("a: !!python/object:os.system x", "could not determine a constructor"),
}


@pytest.mark.parametrize(("text", "words"), WRONG.values(), ids=WRONG)
def test_wrong_yaml_is_one_line(tmp_path: Path, text: str, words: str):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError, match=words) as raised:
        resolve(tmp_path / "r.yaml")
    assert len(str(raised.value).splitlines()) == 1
    assert len(str(raised.value)) < 1_000


def test_aliases_that_stand_for_little_are_read():
    assert read_yaml("a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: *a") == {"a": {"x": 1}, "b": {"x": 1, "y": 2}, "c": {"x": 1}}
    assert read_yaml("") is None
    assert read_yaml("[" * 100 + "]" * 100) is not None
    with pytest.raises(yaml.YAMLError, match="100 deep"):
        read_yaml("[" * 102 + "]" * 102)


@pytest.mark.parametrize("setting", ["a=[1", "seed=2026-99-99", "a=" + "[" * 5_000, "a=&a [*a]"])
def test_wrong_settings_are_one_line(setting: str):
    with pytest.raises(RecipeError, match="--set '[a-z]+': not YAML: ") as raised:
        parse_settings([setting])
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.slow
def test_the_command_ends_soon(tmp_path: Path):
    (tmp_path / "r.yaml").write_text("name: " + "[" * 900_000)
    command = [sys.executable, "-m", "sft_cli", "explain", str(tmp_path / "r.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [f"error: {tmp_path / 'r.yaml'}: not YAML: keys nested more than 100 deep"]
