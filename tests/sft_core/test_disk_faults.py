"""A full disk, a read-only one, a name that is too long: one line, nothing published, and the next run goes on."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from cli.main import main
from sft_core.disk_faults import disk_fault, naming_disk_faults
from sft_core.errors import DataError, DiskError, RowError
from sft_core.pack.renders import Renders
from tests.cli.test_commands import GOOD

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
SECONDS = 800
EACH_STEP = """
import json, resource, yaml
from pathlib import Path
from sft_core.plan import plan_recipe
from sft_core.recipe import resolve
from sft_core.steps import Retraining, run_step
from sft_core.store import Store

if __name__ == "__main__":
    recipe = resolve(yaml.safe_load(Path("good.yaml").read_text()), {"evaluate": {"max_generated_rows": 1}})
    run, found = Retraining(recipe, plan_recipe(recipe), Store("store"), lambda _: None), {}
    for key in run.plan.steps:
        if key != "train":  # whose ranks are processes of their own
            resource.setrlimit(resource.RLIMIT_FSIZE, (512, resource.RLIM_INFINITY))
            try:
                run_step(run, key)
            except Exception as error:
                step = run.plan[key]
                absent = run.store.find(step.step, step.fingerprint) is None
                found[key] = [type(error).__name__, str(error), absent]
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert not run_step(run, key).reused
    print("FOUND", json.dumps(found))
"""
READ_ONLY = "mount --bind store store && mount -o remount,bind,ro store && exec "


def make_project(folder: Path, model: Path) -> Path:
    rows = [f'{{"text": "### Human: say w{i}### Assistant: w{i}!"}}\n' for i in range(40)]
    (folder / "rows.jsonl").write_text("".join(rows))
    (folder / "good.yaml").write_text(GOOD.format(store="store", model=model))
    return folder


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> tuple[Path, dict[str, tuple[str, str, bool]]]:
    """A project after all its steps, each tried first on a disk that takes no more; and what that said. Do not write
    to it."""
    folder = make_project(tmp_path_factory.mktemp("built"), tiny_model)
    (folder / "each_step.py").write_text(EACH_STEP)
    done = run(folder, sys.executable, "each_step.py")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, json.loads(done.stdout.rpartition("FOUND ")[2])


def test_each_step_names_a_disk_that_takes_no_more_and_goes_on_once_it_does(
    built: tuple[Path, dict[str, tuple[str, str, bool]]],
) -> None:
    folder, found = built
    assert list(found) == ["fetch/0", "normalize", "pack", "convert", "merge", "evaluate/tuned", "evaluate/base"]
    for key, (kind, words, absent) in found.items():
        assert (kind, absent) == ("DiskError", True), words
        assert words.startswith(f"{key}: ")
        assert "File too large; raise the limit on a file's size (ulimit -f), or name another disk" in words
        assert "\n" not in words
    assert list((folder / "store" / ".staging").iterdir()) == []


def alone(folder: Path, *arguments: str, command: str = f"{sys.executable} -m cli.main") -> Any:
    """`sft` in a mount namespace in which the store is read-only."""
    unshare = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-rm"]
    return run(folder, *unshare, "sh", "-c", READ_ONLY + " ".join([command, *arguments]))


def can_mount(folder: Path) -> bool:
    return shutil.which("unshare") is not None and alone(folder, command="true").returncode == 0


def test_a_run_that_is_wholly_reused_works_on_a_read_only_store(
    built: tuple[Path, dict[str, tuple[str, str, bool]]],
) -> None:
    folder, _ = built
    if not can_mount(folder):
        pytest.skip("no mount namespaces here")
    again = alone(folder, "train", "good.yaml")
    assert again.returncode == 0, again.stderr
    assert "Read-only file system: sft store gc will count its days from an earlier use" in again.stdout + again.stderr
    other = alone(folder, "train", "good.yaml", "--set", "seed=7")
    assert other.returncode == 1
    assert other.stderr.splitlines()[-1].startswith("error: normalize: ")
    assert "Read-only file system; name a place that can be written to" in other.stderr
    assert "Traceback" not in other.stderr


@pytest.mark.parametrize(
    "change",
    [
        ("base_model.path", "x" * 300),
        ("pack.chat_template", "{% for message in messages %}" * 20),
        ("datasets.0.path", "x" * 300 + ".jsonl"),
        ("datasets.0.map_fn", "x" * 300 + ".py:read"),
        ("evaluate.scorer", "x" * 300 + ".py:score"),
        ("train.deepspeed", "x" * 300 + ".json"),
        ("store", "x" * 300),
        ("name", "x" * 300),
    ],
    ids=lambda change: change[0],
)
def test_a_name_that_is_too_long_is_one_line(
    change: tuple[str, str],
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = make_project(tmp_path, tiny_model)
    key, value = change
    recipe = yaml.safe_load((folder / "good.yaml").read_text())
    *path, last = key.split(".")
    place = recipe
    for name in path:
        place = place[int(name)] if name.isdigit() else place.setdefault(name, {})
    place[last] = value
    (folder / "long.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.chdir(folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("sys.argv", ["sft", "train", "long.yaml"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    told = capsys.readouterr().err
    assert "Traceback" not in told
    assert told.splitlines()[-1].startswith(("error: ", "  "))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), "/x/y: No space left on device; free some space"),
        (OSError(errno.ENOSPC, "", "/from", None, "/to"), "/to: No space left on device"),
        (OSError(errno.EACCES, "Permission denied", "/x"), "/x: Permission denied; get the right to it"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "here: No space left on device"),
        (OSError("[Errno 28] Error writing bytes to file"), "here: No space left on device"),
        (ConnectionError("Connection refused"), None),
        (OSError(errno.ECONNREFUSED, "Connection refused"), None),
        (ValueError("28"), None),
    ],
)
def test_the_machines_faults_are_known_whichever_library_raises_them(error: Exception, words: str | None) -> None:
    told = disk_fault(error, "here")
    assert told == words if words is None else told is not None and told.startswith(words)


def test_a_fault_behind_another_error_is_found() -> None:
    def fail() -> None:
        try:
            raise OSError(errno.EDQUOT, "Disk quota exceeded", "/home/x")
        except OSError as cause:
            raise RuntimeError("could not be saved") from cause

    with pytest.raises(DiskError, match="pack: /home/x: Disk quota exceeded"), naming_disk_faults("pack"):
        fail()
    with pytest.raises(ZeroDivisionError), naming_disk_faults("pack"):
        _ = 1 / 0
    with pytest.raises(DataError), naming_disk_faults("pack"):
        raise DataError("[Errno 28]")


@pytest.mark.parametrize(
    "template",
    [
        "{{ 1 // (messages | length - 1) }}",
        "{{ messages[0].content.nothing.at_all() }}",
        "{{ messages[0].content | int + 'x' }}",
        "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
        "{{ '%d' | format('x') }}",
        "{{ (10.0 ** 400) | int }}",
        "{{ raise_exception('no such role') }}",
    ],
)
def test_whatever_a_template_raises_at_a_row_sets_that_row_aside(template: str) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab={"a": 0}, merges=[])))
    with pytest.raises(RowError, match="template_error: the chat template refuses the first 1 messages"):
        Renders([{"role": "user", "content": "a"}], tokenizer, template, None).upto(1)
