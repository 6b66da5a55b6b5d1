"""The house: one word a step everywhere, small files, no name that shadows, a prefect.yaml without a silent typo."""

import ast
import importlib
import sys
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
import yaml

from sft_core.artifacts import KIND_OF_STEP
from sft_core.recipe import Recipe

ROOT = Path(__file__).parents[2]
STEPS = [*KIND_OF_STEP, "register"]
PACKAGES = ("sft_core", "tasks", "flows", "cli", "demo")
SOURCES = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]


def test_a_step_has_the_same_name_in_the_core_the_tasks_and_the_recipe() -> None:
    sections = {field.alias or name for name, field in Recipe.model_fields.items()}
    for step in STEPS:
        assert importlib.util.find_spec(f"sft_core.{step}") is not None
        assert (ROOT / "tasks" / f"{step}.py").exists()
        if step not in ("fetch", "convert"):  # fetch's keys are those of `datasets`; convert has none
            assert step in sections


def test_no_file_is_over_250_lines_and_no_function_over_60() -> None:
    assert len(SOURCES) > 60
    for path in SOURCES:
        text = path.read_text("utf-8")
        assert text.count("\n") <= 250, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 60, f"{path}: {node.name}"


def test_every_module_says_what_it_is() -> None:
    for path in SOURCES:
        assert ast.get_docstring(ast.parse(path.read_text("utf-8"))), path


def test_flows_and_top_level_folders_shadow_nothing() -> None:
    taken = set(packages_distributions()) | set(sys.stdlib_module_names)
    own = {"flows", "tasks", "sft_core", "cli", "demo", "recipes"}
    for path in (ROOT / "flows").glob("*.py"):
        assert path.stem == "__init__" or path.stem not in taken - own, path


def test_constraints_are_plain_pins() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert len(lines) > 100
    for line in lines:
        name, _, version = line.partition("==")
        assert name, line
        assert version, line
        assert " " not in line, line


DEPLOYMENT_KEYS = {
    "name",
    "entrypoint",
    "description",
    "tags",
    "parameters",
    "schedules",
    "concurrency_limit",
    "work_pool",
    "version",
}
SCHEDULE_KEYS = {"slug", "cron", "timezone", "active", "parameters"}


@pytest.fixture(scope="module")
def prefect_file() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "prefect.yaml").read_text())


def test_prefect_yaml_has_only_keys_that_prefect_reads(prefect_file: dict[str, Any]) -> None:
    """Prefect ignores a misspelt key in silence."""
    assert set(prefect_file) <= {"name", "definitions", "pull", "deployments"}
    for deployment in prefect_file["deployments"]:
        assert set(deployment) <= DEPLOYMENT_KEYS
        assert set(deployment["work_pool"]) <= {"name", "work_queue_name", "job_variables"}
        for schedule in deployment.get("schedules", []):
            assert set(schedule) <= SCHEDULE_KEYS
            assert schedule["active"] is False


def test_every_entrypoint_is_a_flow_and_every_parameter_one_of_its_own(prefect_file: dict[str, Any]) -> None:
    for deployment in prefect_file["deployments"]:
        path, _, name = deployment["entrypoint"].partition(":")
        flow = getattr(importlib.import_module(path.removesuffix(".py").replace("/", ".")), name)
        assert set(deployment.get("parameters", {})) <= set(flow.parameters.properties)
