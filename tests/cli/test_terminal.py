"""Ctrl-C at a terminal: it ends an answer of `sft chat`, a prompt, a model's loading, and any other command."""

import json
import os
import pty
import shutil
import signal
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from cli.chat import _show
from cli.chat import chat as chat_command
from sft_core.stop import Stopped
from tests.services.stack import RECIPE, wait_until, write_project
from tests.terminal import CTRL_C, CTRL_D, Terminal

pytestmark = pytest.mark.slow
SOON = 60.0
"""Bound on an end; 1 s on an idle machine."""
START = Callable[..., Terminal]


@pytest.fixture
def start() -> Iterator[START]:
    """Starts commands in terminals, and ends what is left of them."""
    started: list[Terminal] = []

    def terminal(folder: Path, *arguments: str, **settings: str) -> Terminal:
        started.append(Terminal(folder, *arguments, **settings))
        return started[-1]

    yield terminal
    for command in started:
        command.close()


def chat(start: START, folder: Path, model: Path) -> Terminal:
    """At its first prompt; answers are noise without end: no token that ends one ever comes."""
    endless = shutil.copytree(model, folder / "endless")
    generation = endless / "generation_config.json"
    ends = AutoTokenizer.from_pretrained(model).all_special_ids
    generation.write_text(json.dumps({**json.loads(generation.read_text()), "suppress_tokens": ends}))
    options = ("--chat-template", "chatml", "--max-new-tokens", "100000", "--temperature", "1.5")
    command = start(folder, "chat", str(endless), *options)
    command.wait_for(r"> $")
    return command


def begin_an_answer(command: Terminal) -> None:
    before = len(command.shown)
    command.press(b"say w1\n")
    wait_until(lambda: command.read() > before + 40, SOON, 0.05)


def stop_an_answer(command: Terminal) -> None:
    begin_an_answer(command)
    command.press(CTRL_C)
    command.wait_for(r"\^C\n> $", SOON)


def test_ctrl_c_ends_the_answer_and_the_talk_goes_on_and_at_the_prompt_the_talk(
    start: START, tmp_path: Path, tiny_model: Path
) -> None:
    command = chat(start, tmp_path, tiny_model)
    stop_an_answer(command)
    stop_an_answer(command)
    assert "stopped" not in command.shown
    command.press(CTRL_C)
    assert command.wait_end(SOON) == 130
    assert command.shown.endswith("^C\nstopped\n")


def test_ctrl_d_at_the_prompt_ends_the_talk_well(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a terminal makes of the key is the end of the input."""
    master, terminal = pty.openpty()
    with os.fdopen(terminal) as keyboard:
        os.write(master, CTRL_D)
        monkeypatch.setattr(sys, "stdin", keyboard)
        assert sys.stdin.isatty()
        chat_command(str(tiny_model), chat_template="chatml")
    os.close(master)


def test_sigterm_while_an_answer_comes_ends_the_program(start: START, tmp_path: Path, tiny_model: Path) -> None:
    command = chat(start, tmp_path, tiny_model)
    begin_an_answer(command)
    command.send(signal.SIGTERM)
    assert command.wait_end(SOON) == 143
    assert command.shown.endswith("\nstopped\n")


def test_what_was_shown_of_an_answer_stays_in_the_talk(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer() -> Generator[str]:
        yield "w1"
        yield "7"
        raise Stopped(signal.SIGINT)

    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    assert _show(answer()) == "w17"


def test_ctrl_c_while_libraries_load(start: START, tmp_path: Path, tiny_model: Path) -> None:
    project = write_project(tmp_path / "project", tiny_model)
    loading = start(project, "chat", "base", "--chat-template", "chatml")
    process = Path(f"/proc/{loading.pid}")
    wait_until(
        lambda: "cli.main" in (process / "cmdline").read_text(), SOON, 0.01
    )  # until then it is a copy of this one
    wait_until(lambda: "libtorch" in (process / "maps").read_text(), SOON, 0.01)
    loading.press(CTRL_C)
    assert loading.wait_end(SOON) == 130
    assert loading.shown.splitlines()[-1] == "stopped"
    assert "Traceback" not in loading.shown


def test_ctrl_c_in_another_command_leaves_no_temporary_file(start: START, tmp_path: Path, tiny_model: Path) -> None:
    project = write_project(tmp_path / "project", tiny_model, rows=60_000, recipe=RECIPE)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    command = start(project, "data", "check", "rows.jsonl", TMPDIR=str(scratch))
    wait_until(lambda: list(scratch.glob("sft-check-*/*")), SOON, 0.01)
    command.press(CTRL_C)
    assert command.wait_end(SOON) == 130
    assert "Traceback" not in command.shown
    assert command.shown.splitlines()[-1] == "stopped"
    assert list(scratch.iterdir()) == []
