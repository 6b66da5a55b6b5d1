"""The wheel in a new environment, outside the checkout, in folders laid out as Prefect's users lay theirs out.

The environment sees the installed dependencies, but nothing of the checkout: what runs is what the wheel holds.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pyarrow.parquet as pq
import pytest

from cli.loading import LOAD, our_entrypoints
from cli.servers import Process, end_marked
from tests.services.stack import RECIPE, RUN_SECONDS, wait_until, write_project
from tests.services.test_up import END_SECONDS, Up
from tests.services.test_up import READY_SECONDS as UP_SECONDS

ROOT = Path(__file__).parents[2]
SOURCES = ("cli", "demo", "flows", "recipes", "sft_cli", "sft_core", "tasks")
BUILD_SECONDS = 300.0
MAPS = """
def turn(row):
    return {"conversation": [{"input": strip(row["instruction"]), "output": row["output"]}]}
"""
CLEAN = "def strip(text):\n    return text.strip()\n"
MINE = """
import sys
from prefect import flow
from tasks import clean_word

@flow
def mine():
    print("mine", clean_word(" x "), flush=True)
    assert clean_word(" x ") == "x"
"""
OTHER = "raise RuntimeError('the user has this one')\n"
PLANNED = """
from sft_core.plan import plan_recipe
from sft_core.recipe import resolve
plan_recipe(resolve("recipe.yaml"))
print("recipe.yaml is planned")
"""
CALLED = "load_flow_from_entrypoint(entrypoint).fn()\n"
"""After LOAD, in one process: what a flow run of ours does first, and what one of the user's does."""


@dataclass(frozen=True)
class Layout:
    """A user's files, the map_fn that the recipe names, the user's own entrypoint."""

    map_fn: str
    entrypoint: str
    files: dict[str, str] = field(default_factory=dict)


LAYOUTS = {
    "packages": Layout(
        "tasks.maps:turn",
        "flows/mine.py:mine",
        {
            "tasks/__init__.py": "def clean_word(text):\n    return text.strip()\n",
            "tasks/clean.py": CLEAN,
            "tasks/maps.py": f"from .clean import strip\n{MAPS}",
            "flows/__init__.py": "",
            "flows/mine.py": MINE,
            "cli/__init__.py": OTHER,
            "demo/__init__.py": OTHER,
            "recipes/__init__.py": OTHER,
        },
    ),
    "folders": Layout(
        "flows.maps:turn",
        "flows/mine.py:mine",
        {
            "flows/maps.py": f"from tasks.clean import strip\n{MAPS}",
            "flows/mine.py": MINE.replace("tasks import", "tasks.words import"),
            "tasks/clean.py": CLEAN,
            "tasks/words.py": "def clean_word(text):\n    return text.strip()\n",
            "recipes/nightly.yaml": "name: nightly\n",
        },
    ),
    "modules": Layout(
        "shop.maps:turn",
        "flows.py:mine",
        {
            "flows.py": MINE,
            "tasks.py": "def clean_word(text):\n    return text.strip()\n",
            "cli.py": OTHER,
            "datasets.py": OTHER,
            "shop/maps.py": f"{CLEAN}{MAPS}",
        },
    ),
}


@pytest.fixture(scope="module")
def new_environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheel; its `bin`."""
    pytest.importorskip("setuptools", reason="setuptools, which builds the wheel, is not installed")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in SOURCES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    offline = ["--no-deps", "--no-index"]
    done([*pip, "wheel", *offline, "--no-build-isolation", "-w", str(folder), str(source)], folder)
    environment = folder / "environment"
    done([sys.executable, "-m", "venv", "--without-pip", str(environment)], folder)
    (wheel,) = folder.glob("sft_flows-*.whl")
    python = str(environment / "bin" / "python")
    into = [*pip[:3], "--python", python, *pip[3:]]
    done([*into, "install", *offline, "--ignore-installed", str(wheel)], folder)
    (packages,) = (environment / "lib").glob("python*/site-packages")
    dependencies = [entry for entry in sys.path if Path(entry).name == "site-packages"]
    (packages / "dependencies.pth").write_text("\n".join(dependencies))
    where = done([python, "-c", "import cli, sft_core; print(cli.__file__, sft_core.__file__)"], folder)
    assert where.split() == [str(packages / "cli" / "__init__.py"), str(packages / "sft_core" / "__init__.py")]
    return environment / "bin"


def environment_of(folder: Path) -> dict[str, str]:
    """A user's: nothing of this process' Prefect and MLflow; the user's folder is on the path, as many have it."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_", "PYTHONPATH"))}
    settings = {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "150"}
    return {**inherited, **settings, "PREFECT_HOME": str(folder / "prefect-home")}


def done(command: list[str], folder: Path, seconds: float = BUILD_SECONDS, **settings: str) -> str:
    """What a command printed. AssertionError with it where the status is not 0."""
    ended = subprocess.run(
        command,
        cwd=folder,
        env={**environment_of(folder), **settings},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=seconds,
    )
    assert ended.returncode == 0, f"{command}: status {ended.returncode}\n{ended.stdout[-4000:]}"
    return ended.stdout


def write_layout(folder: Path, tiny_model: Path, layout: Layout) -> Path:
    """The user's project in that layout."""
    write_project(folder, tiny_model, recipe=RECIPE.replace("map_fn: alpaca", f"map_fn: '{layout.map_fn}'"))
    for name, text in layout.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


class InstalledUp(Up):
    """`sft up` of the new environment."""

    def __init__(self, folder: Path, binaries: Path) -> None:
        super().__init__(folder)
        self.binaries = binaries

    def command(self, *options: str) -> list[str]:
        return [str(self.binaries / "sft"), *super().command(*options)[3:]]

    def environment(self) -> dict[str, str]:
        return environment_of(self.folder)

    def wait_completed(self, name: str, parameters: dict[str, Any]) -> None:
        """Run a deployment to its end."""
        deployment = self.api("GET", f"/deployments/name/{name}")
        body = {"parameters": parameters}
        run = self.api("POST", f"/deployments/{deployment['id']}/create_flow_run", body)["id"]

        def ended() -> dict[str, Any] | None:
            try:
                found = self.api("GET", f"/flow_runs/{run}")
            except httpx.TimeoutException:  # a busy machine; asked again
                return None
            return found if found["state_type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED") else None

        state = wait_until(ended, RUN_SECONDS)["state"]
        logs = self.api("POST", "/logs/filter", {"logs": {"flow_run_id": {"any_": [run]}}, "limit": 200})
        assert state["type"] == "COMPLETED", (name, state, [entry["message"] for entry in logs][-20:])

    def prefect_command(self, *arguments: str) -> str:
        """A `prefect` command as the user gives it in the folder."""
        python = str(self.binaries / "python")
        return done([python, "-m", "prefect", *arguments], self.folder, **self.exports())

    def exports(self) -> dict[str, str]:
        """What `sft up --print-env` says."""
        lines = self.run("--print-env").stdout.splitlines()
        return dict(line.removeprefix("export ").split("=", 1) for line in lines)


@pytest.fixture
def ups() -> Iterator[list[InstalledUp]]:
    """Stacks that a test started; all of it ends with the test."""
    started: list[InstalledUp] = []
    yield started
    for up in started:
        if up.process is not None and up.process.poll() is None:
            up.process.send_signal(signal.SIGINT)
            up.process.wait(END_SECONDS)
        end_marked(up.folder / ".sft")


@pytest.mark.parametrize("name", ["folders", "packages"])
def test_commands_work_in_it_and_a_run_would(
    new_environment: Path, tmp_path: Path, tiny_model: Path, name: str
) -> None:
    """The retrainings are below: `sft run` in `folders`, those of `sft up` in `modules`."""
    layout = LAYOUTS[name]
    folder = write_layout(tmp_path / "project", tiny_model, layout)
    sft, python = str(new_environment / "sft"), str(new_environment / "python")
    assert "demo " in done([sft, "recipes", "list"], folder)
    assert "rows out: 60" in done([sft, "data", "check", "rows.jsonl", "--map-fn", layout.map_fn], folder)
    assert "never built" in done([sft, "explain", "recipe.yaml"], folder)
    ours = our_entrypoints(ROOT / "flows" / "prefect.yaml")
    assert done([python, "-c", LOAD + PLANNED, *ours], folder).splitlines()[-1] == "recipe.yaml is planned"
    assert done([python, "-c", LOAD + CALLED, layout.entrypoint], folder).splitlines()[-1] == "mine x"


@pytest.mark.parametrize("name", ["modules"])
def test_sft_up_retrains_in_it(
    new_environment: Path, tmp_path: Path, tiny_model: Path, name: str, ups: list[InstalledUp]
) -> None:
    """The user's own deployment; a whole retraining of ours, a part of it on a worker that the user starts by hand."""
    layout = LAYOUTS[name]
    up = InstalledUp(write_layout(tmp_path / "project", tiny_model, layout), new_environment)
    ups.append(up)
    up.start()
    up.prefect_command("--no-prompt", "deploy", layout.entrypoint, "--name", "own", "--pool", "cpu")
    up.wait_completed("mine/own", {})
    by_hand = start_worker_by_hand(up, "hand")
    try:
        compute = {"prepare": "prepare/by-hand"}
        up.wait_completed("retrain/on-demand", {"recipe": "recipe.yaml", "compute": compute})
    finally:
        by_hand.stop()
    models = done([str(new_environment / "sft"), "models", "list"], up.folder, **up.exports())
    assert "orders" in models
    assert "champion" in models


def start_worker_by_hand(up: InstalledUp, pool: str) -> Process:
    """A worker of a new pool, started in the user's folder as docs/deploy.md says; `prepare` is deployed to it."""
    up.prefect_command("work-pool", "create", pool, "--type", "process")
    ours = up.api("GET", "/deployments/name/prepare/cpu")
    keys = ("flow_id", "entrypoint", "pull_steps", "job_variables", "parameter_openapi_schema", "version")
    up.api("POST", "/deployments/", {key: ours[key] for key in keys} | {"name": "by-hand", "work_pool_name": pool})
    settings = {**environment_of(up.folder), **up.exports(), "SFT_PROJECT_DIR": str(up.folder)}
    log = up.folder / "by-hand.log"
    with log.open("wb") as file:
        worker = subprocess.Popen(
            [str(up.binaries / "python"), "-m", "prefect", "worker", "start", "--pool", pool],
            cwd=up.folder,
            env=settings,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Process(pool, worker, log)


def test_sft_up_does_not_say_that_all_is_well_when_a_flow_cannot_be_loaded(
    new_environment: Path, tmp_path: Path, ups: list[InstalledUp]
) -> None:
    """A copy of an earlier prefect.yaml, whose entrypoints have a name that the user has too."""
    (tmp_path / "flows").mkdir()
    (tmp_path / "flows" / "__init__.py").write_text("")
    shipped = (ROOT / "flows" / "prefect.yaml").read_text()
    (tmp_path / "prefect.yaml").write_text(shipped.replace("sft_cli.deployments.retrain", "flows.retrain.retrain"))
    up = InstalledUp(tmp_path, new_environment)
    ups.append(up)
    ended = subprocess.run(
        up.command(), cwd=tmp_path, env=up.environment(), capture_output=True, text=True, timeout=UP_SECONDS
    )
    (ours,) = (new_environment.parent / "lib").glob("python*/site-packages/flows/__init__.py")
    assert ended.returncode == 1, ended.stdout
    assert "Ctrl-C stops everything" not in ended.stdout
    assert "flows.retrain.retrain: ModuleNotFoundError: No module named 'flows.retrain'" in ended.stderr
    assert f"flows is two files: {tmp_path / 'flows' / '__init__.py'} (yours) and {ours} (of sft-flows" in ended.stderr
    assert up.left() == {}


def test_the_demo_from_the_wheel_climbs_from_near_zero_to_above_nine_tenths(
    new_environment: Path, tmp_path: Path, tiny_model: Path
) -> None:
    """In a folder of the user's, laid out as `folders`. The base model is made on the spot, the rows come with the
    wheel; what is held out are requests that training has not seen."""
    folder = write_layout(tmp_path / "project", tiny_model, LAYOUTS["folders"])
    sft = str(new_environment / "sft")
    assert "Retrain chat models" in done([sft, "--help"], folder)
    explained = subprocess.run([sft, "explain", "demo"], cwd=folder, capture_output=True, text=True, timeout=120)
    assert explained.stderr.strip() == (
        f"error: base_model.path '.demo/base': no such folder ({folder / '.demo' / 'base'}); `sft run demo` makes it"
    )
    printed = done([sft, "run", "demo"], folder, 2 * RUN_SECONDS)
    assert "making a tiny base model" in printed
    assert re.search(r"^verdict +promoted", printed, re.MULTILINE), printed[-3000:]
    base, tuned = map(float, re.findall(r"^exact match +([0-9.]+)% +([0-9.]+)%", printed, re.MULTILINE)[0])
    assert base <= 5
    assert tuned > 90
    trained, held_out = (requests_of(folder / ".demo" / "store", side) for side in ("train", "heldout"))
    assert len(held_out) >= 50
    assert not trained & held_out
    assert "never built" not in done([sft, "explain", "demo"], folder)


def requests_of(store: Path, side: str) -> set[str]:
    """What users ask in the conversations of a side."""
    (normalized,) = (store / "normalize").glob(f"*/{side}")
    rows = [row for file in normalized.glob("*.parquet") for row in pq.read_table(file).to_pylist()]
    return {row["messages"][0]["content"] for row in rows}
