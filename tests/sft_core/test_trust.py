"""Which code a recipe may name. Each attack leaves a mark where it ran; the marks must not be there."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from sft_core.errors import RecipeError
from sft_core.evaluate import harness_parts, scorer_source
from sft_core.evaluate.answers import load_scorer
from sft_core.normalize import load_map_fn, map_fn_source
from sft_core.recipe import resolve
from sft_core.trust import MODULES, PROJECT, REMOTE_CODE

ROOT = Path(__file__).parents[2]
SECONDS = 300
OF_PYTHON = [
    "subprocess:Popen",
    "subprocess:run",
    "os:system",
    "os:rmdir",
    "posix:system",
    "builtins:exec",
    "builtins:eval",
    "shutil:rmtree",
    "importlib:import_module",
    "runpy:run_path",
    "pickle:loads",
    "ctypes:CDLL",
    "webbrowser:open",
    "multiprocessing.util:spawnv_passfds",
    "concurrent.futures:ProcessPoolExecutor",
    "_posixsubprocess:fork_exec",
]
INSTALLED = [
    "yaml:unsafe_load",
    "numpy:load",
    "torch:load",
    "fsspec:open",
    "jinja2:Template",
    "transformers:pipeline",
    "prefect:flow",
    "tasks.models:rollback",
    "sft_core.recipe:resolve",
    "sft_core.store_gc:Path",
]
ROW = "def row(r):\n    return {'text': r['q']}\n"
MARK = "open('mark', 'w').write('ran')\n"
BASE: dict[str, Any] = {"name": "a", "base_model": {"path": "b"}, "datasets": [{"path": "rows.jsonl"}]}


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's folder, with nothing set that says more."""
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for variable in (MODULES, PROJECT, REMOTE_CODE):
        monkeypatch.delenv(variable, raising=False)
    before = set(sys.modules)
    yield folder
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def refused(name: str) -> str:
    """What is said, the same by all doors."""
    said = set()
    for load in (load_map_fn, map_fn_source, load_scorer, scorer_source):
        with pytest.raises(RecipeError) as error:
            load(name)
        said.add(str(error.value).partition(": ")[2])
    assert not Path("mark").exists()
    return said.pop()


@pytest.mark.parametrize("name", [*OF_PYTHON, *INSTALLED])
def test_nothing_of_python_and_nothing_installed_can_be_named(name: str) -> None:
    with pytest.raises(RecipeError, match=r"is part of Python; code is taken from|installed and not of this project"):
        load_map_fn(name)
    with pytest.raises(RecipeError):
        load_scorer(name)


def test_a_list_of_whoever_runs_it_allows_more(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "part of Python" in refused("json:loads")
    monkeypatch.setenv(MODULES, "acme, json")
    assert load_map_fn("json:loads")('{"text": "x"}') == {"text": "x"}
    assert "part of Python" in refused("os:system")
    assert "installed" in refused("jsonschema:validate")  # not by the beginning of its name


def test_a_function_that_a_file_of_the_project_imports_counts_as_where_it_comes_from(project: Path) -> None:
    (project / "helpers.py").write_text(ROW)
    (project / "mine.py").write_text(
        "from subprocess import Popen\nfrom os import system\nfrom functools import partial, cache, wraps\n"
        "from yaml import unsafe_load\nimport json\nfrom helpers import row as theirs\n"
        f"{ROW}cached = cache(row)\nadd = partial(dict, text='x')\n"
        "def wrap(f):\n    @wraps(f)\n    def inner(r):\n        return f(r)\n    return inner\n"
        "wrapped = wrap(row)\n"
    )
    for name in ("Popen", "system", "unsafe_load"):
        for where in ("mine.py", "mine"):
            with pytest.raises(RecipeError, match="is part of Python|is installed"):
                load_map_fn(f"{where}:{name}")
    for name in ("row", "theirs", "cached", "wrapped", "add"):
        for where in ("mine.py", "mine"):
            if name == "cached":
                assert callable(load_map_fn(f"{where}:{name}"))
            else:
                assert load_map_fn(f"{where}:{name}")({"q": "x"})["text"] == "x"


@pytest.mark.parametrize("how", ["beside", "link", "link to a folder", "dots"])
def test_a_file_outside_is_not_run(project: Path, how: str) -> None:
    outside = project.parent / "outside"
    outside.mkdir()
    (outside / "theirs.py").write_text(MARK + ROW)
    (project / "theirs.py").symlink_to(outside / "theirs.py")
    (project / "folder").symlink_to(outside)
    name = {
        "beside": f"{outside}/theirs.py:row",
        "link": "theirs.py:row",
        "link to a folder": "folder/theirs.py:row",
        "dots": "../outside/theirs.py:row",
    }[how]
    assert "is not of this project" in refused(name)


@pytest.mark.parametrize(
    "place",
    [
        "store/merge/abc/modeling_x.py",
        "mlartifacts/1/run/x.py",
        ".venv/x.py",
        ".venv/lib/python3.11/site-packages/x.py",
    ],
)
def test_what_runs_and_servers_write_into_the_project_is_no_code_of_it(project: Path, place: str) -> None:
    """A store holds files that came with a model; MLflow's folder what its clients sent."""
    (project / "store" / ".staging").mkdir(parents=True)
    (project / place).parent.mkdir(parents=True, exist_ok=True)
    (project / place).write_text(MARK + ROW)
    assert "is not of this project" in refused(f"{place}:row")


def test_a_package_of_the_project_may_be_called_store(project: Path) -> None:
    (project / "store").mkdir()
    (project / "store" / "maps.py").write_text(ROW)
    assert load_map_fn("store.maps:row")({"q": "x"}) == {"text": "x"}


def test_the_projects_folder_counts_from_wherever_one_starts(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (project / "mine.py").write_text(ROW)
    monkeypatch.chdir(project.parent)
    (project.parent / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    assert "is not of this project" in refused(f"{project}/mine.py:row")
    monkeypatch.setenv(PROJECT, str(project))
    assert load_map_fn(f"{project}/mine.py:row")({"q": "x"}) == {"text": "x"}


def test_the_root_of_the_disk_is_no_project(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (project / "mine.py").write_text(MARK + ROW)
    monkeypatch.chdir("/")
    with pytest.raises(RecipeError, match="is not of this project"):
        load_map_fn(f"{project}/mine.py:row")


def test_the_folder_of_a_recipe_that_is_named_here_is_trusted_in_all_its_processes(project: Path) -> None:
    other = project.parent / "other"
    other.mkdir()
    (other / "mine.py").write_text(ROW)
    (other / "recipe.yaml").write_text(f"name: a\nbase_model: {{path: b}}\ndatasets: [{{path: {other}/rows.jsonl}}]\n")
    name = f"{other}/mine.py:row"
    assert "is not of this project" in refused(name)
    resolve(other / "recipe.yaml")
    assert load_map_fn(name)({"q": "x"}) == {"text": "x"}
    code = f"from sft_core.normalize import load_map_fn; print(load_map_fn({name!r})({{'q': 'x'}}))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=project, env=environment, capture_output=True, text=True, timeout=SECONDS
    )
    assert done.stdout == "{'text': 'x'}\n", done.stderr[-2000:]


def test_a_task_of_the_harness_is_code(project: Path) -> None:
    outside = project.parent / "outside"
    outside.mkdir()
    (outside / "mine.yaml").write_text("task: mine\nprocess_results: !function x.f\n")
    with pytest.raises(RecipeError, match=r"^evaluate.harness_tasks: .* is not of this project"):
        harness_parts((f"{outside}/mine.yaml",))
    (project / "mine.yaml").write_text("task: mine\n")
    assert harness_parts(("mine.yaml",))["tasks"] == ["mine"]


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"datasets": [{"path": "rows.jsonl", "map_fn": "mine.py:row"}]}, "datasets.0.map_fn"),
        ({"eval_datasets": [{"path": "rows.jsonl", "map_fn": "mine:row"}]}, "eval_datasets.0.map_fn"),
        ({"evaluate": {"scorer": "mine:row"}}, "evaluate.scorer"),
        ({"evaluate": {"harness_tasks": ["gsm8k", "mine.yaml"]}}, "evaluate.harness_tasks"),
        ({"base_model": {"path": "b", "trust_remote_code": True}}, "base_model.trust_remote_code"),
    ],
)
def test_a_recipe_from_a_url_brings_no_code(monkeypatch: pytest.MonkeyPatch, values: dict[str, Any], key: str) -> None:
    with fsspec.open("memory://recipes/mine.yaml", "w") as file:
        file.write(str({**BASE, **values}))
    with pytest.raises(RecipeError, match=rf"^memory://recipes/mine.yaml: a recipe from a URL sets {key}, and .*=1 in"):
        resolve("memory://recipes/mine.yaml")
    monkeypatch.setenv(REMOTE_CODE, "1")
    assert resolve("memory://recipes/mine.yaml").name == "a"


def test_a_recipe_from_a_url_without_code_is_read_and_its_reader_may_add_some() -> None:
    with fsspec.open("memory://recipes/plain.yaml", "w") as file:
        file.write(str({**BASE, "evaluate": {"harness_tasks": ["gsm8k"]}}))
    given = {"evaluate": {"scorer": "mine.py:row"}}
    assert resolve("memory://recipes/plain.yaml", given).evaluate.scorer == "mine.py:row"
