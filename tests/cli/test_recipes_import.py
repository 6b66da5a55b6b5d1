"""`sft recipes` as a user meets it: list, show, copy and import."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sft_core.recipe import resolve, shipped_recipes

ROOT = Path(__file__).parents[2]
COMMAND_SECONDS = 800
CONFIG = """
from pathlib import Path
Path("ran").write_text("at import")
from mmengine.config import nothing_that_is_installed
Path("ran").touch()

model = dict(type="xtuner.model.SupervisedFinetune", llm=dict(pretrained_model_name_or_path="org/base"),
             lora=dict(r=8, lora_alpha=16, lora_dropout=Path("ran").write_text("as a value")))
train_dataset = dict(type="xtuner.dataset.process_hf_dataset", dataset=dict(path="json", data_files="rows.json"),
                     dataset_map_fn="alpaca_map_fn", max_length=512)
"""


def sft(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cli.main", "recipes", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "120"},
        capture_output=True,
        text=True,
        timeout=COMMAND_SECONDS,
    )


def test_import_runs_nothing_and_writes_a_recipe_that_resolves(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(CONFIG)
    done = sft(tmp_path, "import", "mine.py", "--out", "mine.yaml")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.py", "mine.yaml"]
    recipe = resolve(tmp_path / "mine.yaml")
    assert recipe.train.lora is not None
    assert (recipe.name, recipe.base_model.path, recipe.train.lora.r) == ("mine", "org/base", 8)
    assert (recipe.datasets[0].path, recipe.datasets[0].map_fn) == ("rows.json", "alpaca")
    assert "model.lora.lora_dropout = Path('ran').write_text('as a value'): not a literal" in done.stdout
    assert "  line 3: Path('ran').write_text('at import')\n" in done.stdout
    assert "mine.yaml: " in done.stdout
    assert "sft explain mine.yaml" in done.stdout


def test_import_prints_the_recipe_where_no_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(CONFIG)
    done = sft(tmp_path, "import", "mine.py")
    (tmp_path / "printed.yaml").write_text(done.stdout)
    assert resolve(tmp_path / "printed.yaml").base_model.path == "org/base"
    assert "line 3: Path('ran').write_text('at import'): only running it would tell" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nothing.py",), "nothing.py: cannot be read: No such file"),
        (("broken.py",), "broken.py, line 1: not Python"),
        ((".",), "cannot be read: Is a directory"),
        (("mine.py", "--out", "there.yaml"), "there.yaml: exists already; choose another file"),
        (("mine.py", "--out", "no/such/folder.yaml"), "no/such/folder.yaml: cannot be written"),
    ],
)
def test_a_fault_is_one_error_with_status_1(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    (tmp_path / "mine.py").write_text(CONFIG)
    (tmp_path / "broken.py").write_text("model = dict(")
    (tmp_path / "there.yaml").write_text("mine")
    done = sft(tmp_path, "import", *arguments)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "there.yaml").read_text() == "mine"


def test_import_needs_nothing_heavy(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(CONFIG)
    code = (
        "import sys; sys.argv = ['sft', 'recipes', 'import', 'mine.py']\n"
        "from cli.main import main\n"
        "try:\n    main()\n"
        "finally:\n    heavy = {'torch', 'prefect', 'mlflow', 'transformers', 'datasets'} & set(sys.modules)\n"
        "    assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=COMMAND_SECONDS,
    )
    assert done.returncode == 0, done.stderr


def test_list_names_every_recipe_with_what_it_is(tmp_path: Path) -> None:
    done = sft(tmp_path, "list")
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert set(lines) == set(shipped_recipes())


def test_show_and_copy_give_every_recipe_as_it_is_written(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from cli.recipes import app

    for name, text in shipped_recipes().items():
        shown = CliRunner().invoke(app, ["show", name])
        assert (shown.exit_code, shown.stdout) == (0, text)
        resolved = CliRunner().invoke(app, ["show", name, "--resolved"])
        assert f"name: {name}\nseed: 42\n" in resolved.stdout
        copied = CliRunner().invoke(app, ["copy", name, str(tmp_path / name)])
        assert copied.exit_code == 0
        assert resolve(tmp_path / name) == resolve(name)
