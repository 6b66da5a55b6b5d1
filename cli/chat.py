"""`sft chat`."""

import signal
import sys
from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from cli.stopped import go_on
from sft_core.stop import Stopped
from sft_core.terminal import say


def chat(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model folder, or models:/NAME@ALIAS (needs MLflow).")],
    adapter: Annotated[Path | None, typer.Option(help="PEFT folder to put on the model.")] = None,
    chat_template: Annotated[
        str | None, typer.Option(help="Shipped name or Jinja file; the tokenizer's own by default.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens an answer at most.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, help="0: always the likeliest token.")] = 0.0,
) -> None:
    """Talk to a model. One line a turn; /reset forgets the talk, /exit or Ctrl-D ends it. Ctrl-C ends an answer, which
    stays in the talk as far as it was shown; at the prompt it ends the talk with exit status 130.

    Lines can also be piped in: echo "Where is order BX4712?" | sft chat models:/demo@champion
    """
    from sft_core.chat import load_chat_model

    folder = _folder(model)
    loaded = load_chat_model(folder, adapter, chat_template)
    start = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    if sys.stdin.isatty():
        say("/reset forgets the talk, /exit ends it", to_stderr=True)
    while (line := _read_line()) is not None:
        if line == "/exit":
            return
        if line == "/reset":
            messages = list(start)
            continue
        if not line:
            continue
        messages.append({"role": "user", "content": line})
        messages.append({"role": "assistant", "content": _show(loaded.answer(messages, max_new_tokens, temperature))})


def _show(pieces: Generator[str]) -> str:
    """Print an answer as it comes; what was shown of it."""
    shown = []
    try:
        with closing(pieces):
            for piece in pieces:
                say(piece, end="")
                shown.append(piece)
    except Stopped as stopped:
        if stopped.number != signal.SIGINT or not sys.stdin.isatty():
            raise
        go_on()
    say("")
    return "".join(shown)


def _read_line() -> str | None:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None


def _folder(model: str) -> Path:
    if not model.startswith("models:/"):
        return Path(model)
    from tasks.tracking import download_model  # imports mlflow

    return download_model(model)
