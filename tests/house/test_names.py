"""The house: one word a step everywhere, small files, no name that shadows."""

import ast
import importlib.util
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

from sft_core.artifacts import KIND_OF_STEP
from sft_core.recipe import Recipe

ROOT = Path(__file__).parents[2]
STEPS = [*KIND_OF_STEP, "register"]
PACKAGES = ("sft_core", "tasks", "flows", "cli", "sft_cli", "demo")
SOURCES = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]


def test_a_step_has_the_same_name_in_the_core_the_tasks_and_the_recipe() -> None:
    sections = {field.alias or name for name, field in Recipe.model_fields.items()}
    for step in STEPS:
        assert importlib.util.find_spec(f"sft_core.{step}") is not None
        assert (ROOT / "tasks" / f"{step}.py").exists()
        if step not in ("fetch", "convert"):  # fetch's keys are those of `datasets`; convert has none
            assert step in sections


def test_no_file_is_over_400_lines_and_no_function_over_60() -> None:
    assert len(SOURCES) > 60
    for path in SOURCES:
        text = path.read_text("utf-8")
        assert text.count("\n") <= 400, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 60, f"{path}: {node.name}"


def test_every_module_says_what_it_is() -> None:
    for path in SOURCES:
        assert ast.get_docstring(ast.parse(path.read_text("utf-8"))), path


def test_flows_and_top_level_folders_shadow_nothing() -> None:
    taken = set(packages_distributions()) | set(sys.stdlib_module_names)
    own = {"flows", "tasks", "sft_core", "cli", "sft_cli", "demo", "recipes"}
    for path in (ROOT / "flows").glob("*.py"):
        assert path.stem == "__init__" or path.stem not in taken - own, path


def test_nothing_starts_a_program_by_a_name_that_users_have_too() -> None:
    """`python -m tasks.x` in a user's folder is the user's; `python -m sft_cli.module tasks.x` is ours anywhere."""
    shown = [ROOT / "docker-compose.yaml", ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *ROOT.glob("deploy/**/*")]
    for path in {*SOURCES, *shown} - {ROOT / "docs" / "LOG.md"}:
        if path.is_file():
            found = re.findall(r"""-m["']?,? ["']?((?:cli|flows|tasks|recipes)\b[.\w]*)""", path.read_text("utf-8"))
            assert not found, (path, found)


def test_constraints_are_plain_pins() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert len(lines) > 100
    for line in lines:
        name, _, version = line.partition("==")
        assert name, line
        assert version, line
        assert " " not in line, line
