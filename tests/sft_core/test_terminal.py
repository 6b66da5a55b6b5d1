"""Texts of others cannot steer a terminal, and are otherwise shown as they are."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cli.chat import _show
from cli.console import SafeConsole
from sft_core.terminal import one_line, safe, safe_error

ROOT = Path(__file__).parents[2]
SECONDS = 300
"""Bound on a command; 5 s are usual."""
HARMLESS = [
    "naïve Ünïcode Ελληνικά 日本語 العربية עברית हिन्दी",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f3f3\ufe0f\u200d\U0001f308 \U0001f44b\U0001f3fd #\ufe0f\u20e3",
    "\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",  # the flag of England
    "\u0646\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645 \u0915\u094d\u200d\u0937",  # Persian, Hindi: joiners
    "a\tb\nc",
]
HARMFUL = {
    "\x1b[2J": "␛[2J",
    "\x1b]52;c;ZXZpbA==\x07": "␛]52;c;ZXZpbA==␇",
    "\x9b31m": "\\x9b31m",
    "good\rbad": "good␍bad",
    "ab\b\b": "ab␈␈",
    "\x7f\x00": "␡␀",
    "\u202eabc\u202c \u2066x\u2069": "\\u202eabc\\u202c \\u2066x\\u2069",
    "a\u200bb\u200dc\ufeff": "a\\u200bb\\u200dc\\ufeff",
    "\U000e0041\ud800": "\\U000e0041\\ud800",
    "\u2028": "\\u2028",
}
STEERING = [*HARMFUL, "\x1b[31mred\x1b[0m"]
SEEN = list("\x1b\r\b\x07\x7f\x00\u202e\u2066\u200b\ufeff\u2028\x9b\U000e0041")
NAME = "na\x1b[2Jm\u202ee\x9b\r\n.jsonl"
"""Of a file: all that a name may hold."""


@pytest.mark.parametrize("text", HARMLESS)
def test_other_writing_stays(text: str):
    assert safe(text) == text


@pytest.mark.parametrize(("text", "shown"), HARMFUL.items())
def test_what_steers_is_shown(text: str, shown: str):
    assert safe(text) == shown
    assert "".join(map(safe, text)).replace("\u200d", "\\u200d") == shown, "character by character, as a model streams"


def test_one_line_and_errors():
    assert one_line("a\nb\tc\x1b") == "a␊b␉c␛"
    assert safe_error("a\nerror: b\n  c\n") == "a\n  error: b\n  c\n"


def test_the_console_keeps_its_own_colours_only():
    sink = io.StringIO()
    console = SafeConsole(file=sink, force_terminal=True, color_system="standard", width=80)
    console.print("[red]x[/]", end="")
    assert sink.getvalue() == "\x1b[31mx\x1b[0m"
    sink.truncate(0), sink.seek(0)
    for text in STEERING:
        console.print(text, markup=False, highlight=False)
    assert not any(character in sink.getvalue() for character in SEEN)


def test_answers_are_safe_however_they_are_cut(capsys: pytest.CaptureFixture[str]):
    shown = _show(piece for piece in ["a\x1b", "]52;c;ZQ==", "\x07", "\r\u202e", "\U0001f468\u200d", "\U0001f469"])
    assert capsys.readouterr().out == "a␛]52;c;ZQ==␇␍\\u202e\U0001f468\u200d\U0001f469\n"
    assert shown == "a\x1b]52;c;ZQ==\x07\r\u202e\U0001f468\u200d\U0001f469", "the talk holds what the model said"


@pytest.mark.parametrize(
    "begins", ["import sft_cli; guard()", "guard(); import sft_cli", "guard(); import sft_cli; guard()"]
)
def test_log_records_are_safe_and_hold_no_secret_whoever_comes_first(begins: str):
    """`import sft_cli` hides secrets in logs, as every command of ours does; what it also guards must not undo that."""
    logs = 'logging.basicConfig(format="%(message)s"); logging.warning("row %s of %s", "\x1b[2J", "https://me:pw@host/a?sig=b")'
    program = f"import logging; from sft_core.terminal import guard; {begins}; {logs}; logging.warning('%d', 'x')"
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.stderr.splitlines()[0] == "row ␛[2J of https://***@host/a?sig=***"
    assert "TypeError: %d format" in done.stderr  # arguments that do not fit are told as ever


def printed(folder: Path, *arguments: str) -> str:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "MLFLOW_TRACKING_URI": "sqlite:///m.db",
    }
    command = [sys.executable, "-m", "sft_cli", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=SECONDS)
    return (done.stdout + done.stderr).decode("utf-8")


HOSTILE_COMMANDS = {
    "check": ("data", "check", NAME),
    "check with map_fn": ("data", "check", NAME, "--map-fn", "openai"),
    "check of no file": ("data", "check", f"no{NAME}"),
    "preview": ("data", "preview", "r.yaml"),
    "explain": ("explain", "r.yaml"),
    "explain of no recipe": ("explain", NAME),
    "setting": ("explain", "demo", "--set", "na\x1b[2Jme=\x1b[2J"),
    "train": ("train", "r.yaml"),
    "show": ("recipes", "show", "r.yaml"),
    "import": ("recipes", "import", "c.py"),
    "store": ("store", "ls", NAME),
    "chat": ("chat", NAME),
    "convert": ("convert", "merge", NAME, NAME, "out"),
    "models": ("models", "list", NAME),
}


@pytest.mark.slow
@pytest.mark.parametrize("arguments", HOSTILE_COMMANDS.values(), ids=HOSTILE_COMMANDS)
def test_hostile_texts_through_every_command(tmp_path: Path, tiny_model: Path, arguments: tuple[str, ...]):
    rows = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text}]} for text in STEERING
    ]
    rows += [{"na\x1b[2Jme\u202e": text, "messages\x9b": "\r"} for text in STEERING]
    (tmp_path / NAME).write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"a": "\x1b[2J"\n')
    recipe = {"name": "a", "base_model": {"path": str(tiny_model)}, "datasets": [{"path": NAME, "map_fn": "openai"}]}
    pack = {"chat_template": "chatml"}
    limits = {"pack": pack, "max_quarantined_fraction": 0.01, "\x1b[2J\u202e": "\x9b"}
    wrong = arguments[0] in ("explain", "recipes")
    (tmp_path / "r.yaml").write_text(
        json.dumps({**recipe, **(limits if wrong else {"pack": pack, "max_quarantined_fraction": 1.0})})
    )
    (tmp_path / "c.py").write_text("model = dict(type='\x1b[2J\u202e')\nx = f('\x9b')\n")
    said = printed(tmp_path, *arguments)
    assert said.strip()
    assert not any(character in said for character in SEEN), repr(said)[:3000]
