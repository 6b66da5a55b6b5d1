"""Names that users have too: ours are ours in our processes, whatever lies in the user's folder; theirs are found too.

Each case is a process of its own that starts as Prefect's flow-run process does: the user's folder first on its path.
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECONDS = 120
ROW = "def row(r):\n    return {'text': strip(r['q'])}\n"
LAYOUTS = {
    "packages": {
        "tasks/__init__.py": "",
        "tasks/maps.py": f"from .clean import strip\n{ROW}",
        "tasks/clean.py": "def strip(text):\n    return text.strip()\n",
        **{f"{name}/__init__.py": "raise SystemExit('the user has this one')\n" for name in ("flows", "cli", "demo")},
        "recipes/__init__.py": "",
        "flows/mine.py": f"from tasks import clean\nstrip = clean.strip\n{ROW}",
        "shop/maps.py": f"import tasks.clean as c\nstrip = c.strip\n{ROW}",
        "late.py": "def row(r):\n    from tasks.clean import strip\n    return {'text': strip(r['q'])}\n",
    },
    "folders": {
        "tasks/maps.py": f"from tasks.clean import strip\n{ROW}",
        "tasks/clean.py": "def strip(text):\n    return text.strip()\n",
        "flows/mine.py": f"from tasks.clean import strip\n{ROW}",
        "shop/maps.py": f"from tasks.clean import strip\n{ROW}",
        "cli/x.py": "",
        "recipes/mine.yaml": "",
        "demo/data/x.jsonl": "",
        "late.py": "def row(r):\n    from tasks.clean import strip\n    return {'text': strip(r['q'])}\n",
    },
    "modules": {
        **{f"{name}.py": "raise SystemExit('the user has this one')\n" for name in ("flows", "cli", "recipes", "demo")},
        "tasks.py": f"def strip(text):\n    return text.strip()\n{ROW}",
        "datasets.py": "raise SystemExit('the user has this one')\n",
        "shop/maps.py": f"def strip(text):\n    return text.strip()\n{ROW}",
    },
}
MAP_FNS = {
    "packages": ["tasks.maps:row", "flows/mine.py:row", "flows.mine:row", "shop.maps:row", "late:row", "late.py:row"],
    "folders": ["tasks.maps:row", "flows.mine:row", "flows/mine.py:row", "shop.maps:row", "late:row", "late.py:row"],
    "modules": ["tasks.py:row", "shop.maps:row"],
}
OURS = """
import cli, demo, flows, recipes, tasks, cli.environment, tasks.retries, datasets, pathlib
from sft_core.recipe import shipped_recipes
assert "demo" in shipped_recipes()
print([str(pathlib.Path(m.__file__).parent) for m in (cli, demo, flows, recipes, tasks)])
"""
LOAD = """
from sft_core.normalize import load_map_fn, map_fn_source
for name in sys.argv[1:]:
    assert load_map_fn(name)({"q": " x "}) == {"text": "x"}, name
    print(sorted(map_fn_source(name)["code"]))
"""
IN_A_POOL = """
from sft_core.normalize.shard import load_once
from sft_core.processes import process_mapper
from functools import partial
def main():
    with process_mapper(2) as mapper:
        found = list(mapper(partial(load_once, call="x"), sys.argv[1:] * 3))
    print([f({"q": " y "})["text"] for f in found])
if __name__ == "__main__":
    main()
"""


def lay(folder: Path, layout: dict[str, str]) -> None:
    for name, text in layout.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def python(folder: Path, code: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """`code` in a process whose `sys.path` begins with `folder`, twice: as `-c`'s own entry and by PYTHONPATH."""
    return subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_our_packages_are_ours_in_our_processes(tmp_path: Path, layout: str) -> None:
    lay(tmp_path, LAYOUTS[layout])
    done = python(tmp_path, "import sft_cli\n" + OURS)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == str([str(ROOT / name) for name in ("cli", "demo", "flows", "recipes", "tasks")])


def test_a_module_of_ours_runs_as_a_program_in_the_users_folder(tmp_path: Path) -> None:
    lay(tmp_path, LAYOUTS["packages"])
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "sft_cli.module", "cli.main", "--help"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=SECONDS)
    assert "Retrain chat models" in done.stdout, done.stderr[-2000:]


def test_without_it_the_users_come_first(tmp_path: Path) -> None:
    """That the layouts are what they are meant to be."""
    lay(tmp_path, LAYOUTS["packages"])
    assert "the user has this one" in python(tmp_path, OURS).stderr


def test_in_a_process_of_the_users_own_theirs_come_first(tmp_path: Path) -> None:
    """Folders without `__init__.py`: Python takes an installed package before them. Then ours are held, or loaded."""
    lay(tmp_path, {**LAYOUTS["folders"], "tasks/fetch.py": "THEIRS = 1\n", "flows/job.py": "THEIRS = 1\n"})
    theirs = "from tasks.fetch import THEIRS\nfrom flows.job import THEIRS\nfrom tasks.clean import strip\n"
    done = python(tmp_path, theirs)
    assert done.returncode == 0, done.stderr[-2000:]
    ours = "import flows.hooks\nimport sft_cli\nfrom tasks.retries import retry_unless_users_fault\n"
    done = python(tmp_path, f"{ours}import tasks, pathlib\nprint(pathlib.Path(tasks.__path__[0]).parent)")
    assert done.stdout.strip() == str(ROOT), done.stderr[-2000:]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("first", ["", "import sft_cli\n", "import tasks.retries\n"])
def test_the_users_own_are_found_in_any_process(tmp_path: Path, layout: str, first: str) -> None:
    """In a process of ours, in one that knows only the core, in one whose `tasks` was loaded by whoever came first."""
    lay(tmp_path, LAYOUTS[layout])
    if "retries" in first:  # our tasks came in by the checkout's place on the path
        first = f"sys.path.insert(0, {str(ROOT)!r})\n{first}sys.path.pop(0)\n"
    done = python(tmp_path, first + LOAD, *MAP_FNS[layout])
    assert done.returncode == 0, done.stderr[-2000:]


def test_what_a_function_uses_of_the_users_packages_is_part_of_its_identity(tmp_path: Path) -> None:
    lay(tmp_path, LAYOUTS["packages"])
    done = python(tmp_path, LOAD, "tasks.maps:row", "shop.maps:row")
    assert done.stdout.splitlines() == [
        "[':row', ':strip', 'tasks.clean:strip']",
        "[':c', ':row', ':strip', 'tasks.clean:strip']",
    ], done.stderr[-2000:]


def test_they_are_found_in_the_processes_of_num_proc(tmp_path: Path) -> None:
    """The child gets the function by its name: what it unpickles must be what the parent had."""
    lay(tmp_path, LAYOUTS["packages"])
    (tmp_path / "run.py").write_text(f"import sys\n{IN_A_POOL}")
    code = f"import sft_cli, runpy\nrunpy.run_path({str(tmp_path / 'run.py')!r}, run_name='__main__')\n"
    done = python(tmp_path, code, "tasks.maps:row")
    assert done.stdout.strip() == str(["y"] * 3), done.stderr[-2000:]


@dataclass(frozen=True)
class Two:
    """A user's files, the map_fn that is asked for, and the module that is in two files."""

    files: dict[str, str]
    name: str
    dotted: str
    theirs: str
    ours: str


STRIP = "def strip(text):\n    return text\n"
COLLISIONS = [
    Two({"tasks/fetch.py": ROW}, "tasks.fetch:row", "tasks.fetch", "tasks/fetch.py", "tasks/fetch.py"),
    Two({"tasks.py": ROW}, "tasks:row", "tasks", "tasks.py", "tasks/__init__.py"),
    Two({"flows/job/__init__.py": ROW}, "flows.job:row", "flows.job", "flows/job/__init__.py", "flows/job.py"),
    Two(
        {"shop.py": f"from tasks import strip\n{ROW}", "tasks.py": STRIP},
        *("shop:row", "tasks", "tasks.py", "tasks/__init__.py"),
    ),
    Two(
        {"shop.py": f"from tasks.fetch import strip\n{ROW}", "tasks/fetch.py": STRIP},
        *("shop:row", "tasks.fetch", "tasks/fetch.py", "tasks/fetch.py"),
    ),
]


@pytest.mark.parametrize("two", COLLISIONS, ids=lambda two: f"{two.name} {two.theirs}")
@pytest.mark.parametrize("call", ["load_map_fn", "map_fn_source"])
def test_a_collision_names_both_files(tmp_path: Path, call: str, two: Two) -> None:
    lay(tmp_path, two.files)
    code = f"""
import sft_cli
from sft_core.errors import RecipeError
from sft_core.normalize import {call}
try:
    {call}({two.name!r})
except RecipeError as error:
    print(error)
"""
    done = python(tmp_path, code)
    itself = two.name.startswith(f"{two.dotted}:")
    end = f"rename yours, or write {two.theirs}:row" if itself else "rename yours"
    assert done.stdout.strip() == (
        f"map_fn {two.name!r}: {two.dotted} is two files: {tmp_path / two.theirs} (yours) and {ROOT / two.ours} (of "
        f"sft-flows; it is the one that is loaded); {end}"
    ), done.stderr[-2000:]


def test_the_way_out_of_a_collision_works(tmp_path: Path) -> None:
    lay(tmp_path, {"tasks.py": STRIP + ROW})
    done = python(tmp_path, "import sft_cli\n" + LOAD.replace(" x ", "x"), "tasks.py:row")
    assert done.returncode == 0, done.stderr[-2000:]
