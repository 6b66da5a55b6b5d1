"""The `sft` command as a user meets it: help, one clear error, exit status."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.commands import Commands

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared"
COMMAND_SECONDS = 800
GOOD = """
name: test
store: {store}
base_model: {{path: {model}}}
datasets: [{{path: rows.jsonl, map_fn: oasst1}}]
eval_fraction: 0.3
pack: {{max_length: 128, chat_template: chatml}}
train: {{dtype: float32, max_steps: 2, per_device_train_batch_size: 2, gradient_accumulation_steps: 1, logging_steps: 1,
  lora: {{r: 4, lora_alpha: 8, lora_dropout: 0}}, gradient_checkpointing: false, learning_rate: 0.01}}
"""


HELP = """
import sys
from cli.main import main
for command in ("", "run", "train", "explain", "chat", "convert", "convert pth-to-hf", "convert merge", "recipes",
                "recipes list", "recipes show", "recipes copy"):
    sys.argv = ["sft", *command.split(), "--help"]
    try:
        main()
    except SystemExit as ended:
        assert not ended.code, command
    heavy = {"torch", "prefect", "mlflow", "transformers", "datasets"} & set(sys.modules)
    assert not heavy, (command, heavy)
    print("end of help", flush=True)
"""
Sft = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def folder(tmp_path: Path, tiny_model: Path) -> Path:
    rows = [f'{{"text": "### Human: say w{i}### Assistant: w{i}!"}}\n' for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    (tmp_path / "good.yaml").write_text(GOOD.format(store="store", model=tiny_model))
    return tmp_path


@pytest.fixture
def sft(folder: Path, commands: Commands) -> Sft:
    """A command in the folder."""
    return partial(commands.run, folder)


def test_help_says_what_a_command_does_and_imports_nothing_heavy() -> None:
    done = subprocess.run(
        [sys.executable, "-c", HELP], cwd=ROOT, capture_output=True, text=True, timeout=COMMAND_SECONDS
    )
    assert done.returncode == 0, done.stderr
    *texts, end = done.stdout.split("end of help\n")
    assert end == ""
    assert len(texts) == 12
    for text in texts:
        assert len(text) > 200
        assert "Usage" in text


def break_file(name: str, old: str, new: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / name
        path.write_text(path.read_text().replace(old, new))

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (break_file("good.yaml", "seed", "seed"), None),
        (break_file("good.yaml", "train:", "trian:"), "trian: unknown key"),
        (break_file("good.yaml", "0.01", "-0.01"), "train.learning_rate: Input should be greater than 0 (value -0.01)"),
        (break_file("good.yaml", "oasst1", "oast1"), "oasst1"),
        (break_file("good.yaml", "rows.jsonl", "no-such-rows.jsonl"), "no-such-rows.jsonl"),
        (break_file("good.yaml", "chatml", "chatmel"), "chatml"),
        (break_file("good.yaml", "path: /", "path: /no/such/"), "no such folder"),
        (break_file("good.yaml", "name: test", "name: [test"), "good.yaml: not YAML"),
    ],
)
def test_explain_names_a_fault_in_one_error_with_status_1(
    sft: Sft, folder: Path, change: Callable[[Path], None], words: str | None
) -> None:
    change(folder)
    done = sft("explain", "good.yaml")
    if words is None:
        assert done.returncode == 0, done.stderr
        return
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not (folder / "store").exists()


def test_debug_shows_the_traceback(sft: Sft) -> None:
    done = sft("--debug", "explain", "nothing.yaml")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "RecipeError" in done.stderr


def test_explain_and_train_say_what_was_mended_of_the_base(sft: Sft, folder: Path, tiny_model: Path) -> None:
    base = shutil.copytree(tiny_model, folder / "base")
    generation = base / "generation_config.json"
    generation.write_text(json.dumps({**json.loads(generation.read_text()), "temperature": 0.6}))
    break_file("good.yaml", str(tiny_model), str(base))(folder)
    said = f"note: base model {base}: generation_config.json has temperature 0.6 without do_sample"
    explained = sft("explain", "good.yaml", COLUMNS="500")
    assert explained.returncode == 0, explained.stderr
    assert said in explained.stdout
    break_file("good.yaml", "oasst1", "alpaca")(folder)  # the note is said before anything is done: it fails then
    trained = sft("train", "good.yaml")
    assert said in trained.stderr
    assert "missing_column" in trained.stderr


def test_a_missing_column_names_the_row_the_columns_and_a_map_fn_that_fits(sft: Sft, folder: Path) -> None:
    (folder / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 30)
    done = sft("train", "good.yaml")
    assert done.returncode == 1
    assert "missing_column" in done.stderr
    assert "rows.jsonl" in done.stderr
    assert "code_alpaca" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("rows", "map_fn", "words"),
    [
        ("", "oasst1", "is empty"),
        ('{"text": "### Human: say a### Assistant: "}\n' * 30, "oasst1", "empty_answer"),
        (
            "".join(
                f'{{"messages": [{{"role": "user", "content": "say {i}"}}, '
                f'{{"role": "assistant", "content": "{i}", "weight": 0}}]}}\n'
                for i in range(30)
            ),
            "openai",
            "all_weights_zero",
        ),
    ],
)
def test_nothing_to_train_on_fails_before_any_training(
    sft: Sft, folder: Path, rows: str, map_fn: str, words: str
) -> None:
    (folder / "rows.jsonl").write_text(rows)
    done = sft("train", "good.yaml", "--set", f"datasets=[{{path: rows.jsonl, map_fn: {map_fn}}}]")
    assert done.returncode == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not (folder / "store" / "train").exists()


@pytest.mark.slow
def test_train_convert_and_merge_work_on_folders_without_prefect_and_mlflow(folder: Path, tiny_model: Path) -> None:
    blocked = folder / "blocked"
    for name in ("prefect", "mlflow"):
        (blocked / name).mkdir(parents=True)
        (blocked / name / "__init__.py").write_text("raise ImportError('not on this machine')\n")
    without = Commands(folder / "commands", PYTHONPATH=f"{blocked}:{ROOT}")

    def run(*arguments: str) -> str:
        done = without.run(folder, *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    checkpoint = run("train", "good.yaml").strip().splitlines()[-1].removeprefix("checkpoint: ")
    assert "28 tensors" in run("convert", "pth-to-hf", "good.yaml", checkpoint, "adapter")
    run("convert", "merge", str(tiny_model), "adapter", "merged", "--base", "dequantized")
    assert (folder / "merged" / "model.safetensors").exists()
    assert "not on this machine" in without.run(folder, "models", "list").stderr
    without.end()
    again = subprocess.run(
        [sys.executable, "-m", "cli.main", "convert", "merge", str(tiny_model), "adapter", "merged"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=COMMAND_SECONDS,
    )
    assert again.returncode == 1
    assert "merged: exists and is not empty" in again.stderr


def test_xtuners_checkpoint_converts_and_a_torn_one_is_refused(sft: Sft, folder: Path) -> None:
    source = SHARED / "checkpoints" / "xtuner"
    if not source.is_dir():
        pytest.skip("../shared/checkpoints is not here: real XTuner checkpoints are only on the project's own machines")
    recipe = folder / "xtuner.yaml"
    recipe.write_text(
        f"name: x\nbase_model: {{path: {source / 'base'}}}\ndatasets: [{{path: rows.jsonl}}]\n"
        "train: {quantization: none, lora: {r: 4, lora_alpha: 16, lora_dropout: 0.1}}\n"
    )
    done = sft("convert", "pth-to-hf", "xtuner.yaml", str(source / "lora" / "iter_4.pth"), "adapter")
    assert done.returncode == 0, done.stderr
    torn = folder / "torn.pth"
    torn.write_bytes((source / "lora" / "iter_4.pth").read_bytes()[:20000])
    refused = sft("convert", "pth-to-hf", "xtuner.yaml", str(torn), "adapter2")
    assert refused.returncode == 1
    assert "torn.pth" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_recipes_are_listed_shown_and_copied_once(sft: Sft, folder: Path) -> None:
    assert "demo " in sft("recipes", "list").stdout
    assert sft("recipes", "show", "demo").stdout == (ROOT / "recipes" / "demo.yaml").read_text()
    assert "adam_beta2: 0.999" in sft("recipes", "show", "demo", "--resolved").stdout
    assert sft("recipes", "copy", "demo", "mine.yaml").returncode == 0
    assert (folder / "mine.yaml").read_text() == (ROOT / "recipes" / "demo.yaml").read_text()
    assert "exists already" in sft("recipes", "copy", "demo", "mine.yaml").stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("chat", "no-such-folder"), "no-such-folder: no such folder"),
        (("chat", "."), "no config.json"),
        (("convert", "merge", "a", "b", "c", "--base", "half"), "say full, dequantized or auto"),
    ],
)
def test_wrong_arguments_are_named(sft: Sft, arguments: tuple[str, ...], words: str) -> None:
    done = sft(*arguments)
    assert done.returncode == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr
