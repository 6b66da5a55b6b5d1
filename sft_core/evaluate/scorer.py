"""The user's scorer, in a process of its own: each score comes within a bound, or one error names the row.

In: its name. Out: a function from an answer to its score. What it does, a loop without end, `sys.exit`, a crash in C,
ends that process alone. The process is one for all answers, so what the scorer keeps (a model it loads) it keeps.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

from sft_core import stop
from sft_core.children import die_with_parent
from sft_core.errors import DataError, RecipeError
from sft_core.evaluate.answers import KEY, load_scorer, score_answer

LOAD_SECONDS, SCORER_SECONDS = 600.0, 600.0
"""For loading it, and for one answer: a judge behind a network, or a model that is loaded first, takes its time."""
Score = Callable[[str, list[dict[str, Any]], str], float]
"""Of a row's id, its messages (the last is the reference) and the answer."""


@contextmanager
def open_scorer(name: str, seconds: float = SCORER_SECONDS) -> Iterator[Score]:
    """Start it; it has ended afterwards. RecipeError if it cannot be loaded. What is yielded raises DataError where a
    score is no finite number, or takes over `seconds`."""
    ours, theirs = get_context("spawn").Pipe()
    process = get_context("spawn").Process(target=_serve, args=(theirs, name, os.getpid()), name="scorer")
    with stop.kept_from_children():
        process.start()
    theirs.close()

    def answer_of(where: str, within: float) -> Any:
        try:
            if not ours.poll(within):
                raise DataError(
                    f"{KEY}: {where}: no answer from it after {within:.0f} s, and it was ended; mend what loops or "
                    "waits there without a bound"
                )
            return ours.recv()
        except (EOFError, OSError):
            process.join()
            raise DataError(f"{KEY}: {where}: its process ended (exit code {process.exitcode})") from None

    def score(row_id: str, messages: list[dict[str, Any]], answer: str) -> float:
        ours.send((row_id, messages, answer))
        value = answer_of(f"row {row_id}", seconds)
        if isinstance(value, str):
            raise DataError(value)
        return float(value)

    try:
        fault = answer_of(f"{name!r} is being loaded", LOAD_SECONDS)
        if fault is not None:
            raise RecipeError(fault)
        yield score
    finally:
        process.kill()
        process.join()
        ours.close()


def _serve(pipe: Connection, name: str, parent: int) -> None:
    """In the new process: what is sent back is None or a number, or a text that says what was wrong."""
    die_with_parent(parent)
    try:
        scorer = load_scorer(name)
    except BaseException as error:  # noqa: BLE001 - a user's module may raise anything; said in the parent
        pipe.send(_text(error))
        return
    pipe.send(None)
    while True:
        row_id, messages, answer = pipe.recv()
        try:
            pipe.send(score_answer(scorer, row_id, messages, answer))
        except BaseException as error:  # noqa: BLE001 - also sys.exit: the row is named in the parent
            pipe.send(_text(error))


def _text(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
