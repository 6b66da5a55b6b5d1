"""Bounds on what a chat template may cost: the sandbox of Jinja keeps it from the machine, not from its time and
memory.

In: a template as transformers compiled it. Out: the same template, whose operators, filters and calls refuse texts of
over RENDER_CHARACTERS before they make them; and `within_time`, inside which a rendering ends after RENDER_SECONDS of
CPU time.

A loop is ended by a thread that watches, and raises `TooCostly` in the thread that renders, between two bytecodes. What
takes long in C alone is made of texts, and those are bounded.
"""

import ctypes
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import lru_cache, partial
from typing import Any

from sft_core.bounds import RENDER_CHARACTERS, RENDER_SECONDS

LOOK_SECONDS = 0.5
MOST_COUNT = 10_000_000
"""Of a repetition, a width, a whole number that a template gives to a method or filter."""
MOST_PARTS = 5_000_000
"""Of lists and mappings that are printed."""
WIDTH = re.compile(r"\d{7}")
"""In a format: millions of characters."""
OPERATORS = frozenset("+*%") | {"**"}
Operator = Callable[[Any, Any], Any]


class TooCostly(Exception):
    """A rendering over a bound; what it was is said."""

    def __init__(self, words: str = f"it takes over {RENDER_SECONDS:.0f} s of CPU time") -> None:
        super().__init__(words)


class OutOfTime(TooCostly):
    """A rendering that took too long."""


def bound_template(chat_template: str) -> Any:
    """The template, compiled as transformers does, with bounds. jinja2.TemplateSyntaxError if it is not Jinja."""
    template = _environment().from_string(chat_template)
    template.root_render_func.__globals__["str_join"] = _concatenate
    return template


@lru_cache(maxsize=1)
def _environment() -> Any:
    """Of an empty template: constant expressions are computed while a template is compiled, which has to be bounded."""
    from transformers.utils import chat_template_utils  # imports torch

    environment = chat_template_utils._compile_jinja_template("").environment
    environment.globals.pop("lipsum", None)
    environment.intercepted_binops = OPERATORS
    environment.call_binop = _call_operator
    bounded = {name: _bounded(name, environment.filters[name]) for name in GROWING & environment.filters.keys()}
    environment.filters.update(bounded)
    environment.call = partial(_call, environment.call)
    environment.finalize = _finalize
    return environment


class within_time:  # noqa: N801 - used as a function
    """TooCostly inside, in this thread, once RENDER_SECONDS of its CPU time are over."""

    __slots__ = ("_watched",)

    def __enter__(self) -> None:
        self._watched = _watcher.begin()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        _watcher.end(self._watched, delivered=kind is OutOfTime)


def take_blocks(blocks: Iterator[str], kept: list[str]) -> None:
    """Append the blocks of a rendering to `kept`, as they come. TooCostly if they are too many characters."""
    size = 0
    for block in blocks:
        size += len(block)
        if size > RENDER_CHARACTERS:
            raise TooCostly(TOO_LONG)
        kept.append(block)


TOO_LONG = f"it makes a text of over {RENDER_CHARACTERS:,} characters"


def _call_operator(context: Any, name: str, left: Any, right: Any) -> Any:
    """`left + right` and so on, unless it would be too large. A sum is no bomb by itself: it is made first."""
    if name != "+":
        return _RARE[name](left, right)
    made = left + right
    if isinstance(made, str | list | tuple) and len(made) > RENDER_CHARACTERS:
        raise TooCostly(TOO_LONG)
    return made


def _times(left: Any, right: Any) -> Any:
    if isinstance(left, int) and isinstance(right, int):
        _check(left.bit_length() + right.bit_length())
    for text, count in ((left, right), (right, left)):
        if isinstance(text, str | bytes | list | tuple) and isinstance(count, int):
            _check(len(text) * count)
    return left * right


def _power(left: Any, right: Any) -> Any:
    if isinstance(left, int) and isinstance(right, int):
        _check(left.bit_length() * max(right, 0))
    return left**right


def _percent(left: Any, right: Any) -> Any:
    _check_parts(right)
    _check_format(left, right)
    return left % right


_RARE: dict[str, Operator] = {"*": _times, "**": _power, "%": _percent}


def _call(call: Callable[..., Any], context: Any, called: Any, *arguments: Any, **named: Any) -> Any:
    """A method or a macro: a text's `replace`, `center`, `format`, ... may grow it."""
    if arguments or named:
        method = getattr(called, "__wrapped__", called)  # the sandbox wraps `format`
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str | bytes):
            _check_growth(method.__name__, owner, arguments, named)
    return call(context, called, *arguments, **named)


def _bounded(name: str, do: Callable[..., Any]) -> Callable[..., Any]:
    marked = hasattr(do, "jinja_pass_arg")

    def bounded(*arguments: Any, **named: Any) -> Any:
        given = arguments[1:] if marked else arguments
        if given and isinstance(given[0], str):
            _check_growth(name, given[0], given[1:], named)
        else:
            _check_counts(given[1:], named)
            _check_parts(given)
        return do(*arguments, **named)

    if marked:
        bounded.jinja_pass_arg = do.jinja_pass_arg  # type: ignore[attr-defined]
    return bounded


GROWING = frozenset(
    "batch center format indent join pprint replace slice string sum tojson truncate urlencode wordwrap xmlattr e "
    "escape forceescape upper lower title trim capitalize striptags".split()
)
"""Filters whose result may be far larger than what they are given; or which make a text of a list."""


def _finalize(value: Any) -> Any:
    """What is printed."""
    if type(value) is not str and isinstance(value, list | tuple | dict):
        _check_parts(value)
    return value


def _check_parts(value: Any) -> None:
    """TooCostly for a list that stands for far more than it holds: one that holds another twice, and so on."""
    left, waiting = MOST_PARTS, [value]
    while waiting:
        part = waiting.pop()
        inner = list(part.values()) if isinstance(part, dict) else part if isinstance(part, list | tuple) else ()
        left -= len(inner)
        if left < 0:
            raise TooCostly(f"it prints a list of over {MOST_PARTS:,} parts")
        waiting += inner


def _check_growth(name: str, owner: Any, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> None:
    _check_counts(arguments, named)
    given = [*arguments, *named.values()]
    if name == "replace" and len(given) >= 2 and isinstance(given[0], str) and isinstance(given[1], str):
        _check(len(owner) + owner.count(given[0]) * len(given[1]))
    elif name == "join" and given and hasattr(given[0], "__len__"):
        _check(len(owner) * len(given[0]))
    elif name == "indent":
        _check(len(owner) + owner.count("\n") * max((_size(part) for part in given), default=4))
    elif name in ("format", "format_map"):
        _check_format(owner, given)
    elif name == "expandtabs":
        _check(len(owner) + owner.count("\t") * max([8, *(part for part in given if isinstance(part, int))]))


def _size(value: Any) -> int:
    return value if isinstance(value, int) else len(value) if isinstance(value, str) else 0


def _check_counts(arguments: tuple[Any, ...], named: Mapping[str, Any]) -> None:
    for value in (*arguments, *named.values()):
        if isinstance(value, int) and abs(value) > MOST_COUNT:
            raise TooCostly(f"it asks for {abs(value):.3g} of something")


def _check_format(form: Any, given: Any) -> None:
    if isinstance(form, str) and (WIDTH.search(form) or "*" in form):
        raise TooCostly("it writes a format of millions of characters")
    if isinstance(form, str):
        parts = given if isinstance(given, list | tuple) else [given]
        _check(len(form) * max((len(part) for part in parts if isinstance(part, str)), default=1))


def _check(size: int) -> None:
    if size > RENDER_CHARACTERS:
        raise TooCostly(TOO_LONG)


def _concatenate(parts: tuple[Any, ...]) -> str:
    """In place of Jinja's `str_join`, for `~`."""
    texts = [str(_finalize(part)) for part in parts]
    _check(sum(map(len, texts)))
    return "".join(texts)


class _Watched:
    """A thread that renders. `number` counts its renderings; `seen`: which one the watcher saw, at what CPU time."""

    __slots__ = ("active", "clock", "number", "seen", "thread", "told")

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.clock = time.pthread_getcpuclockid(self.thread)
        self.number, self.active, self.told = 0, False, False
        self.seen = (0, 0.0)


class _Watcher(threading.local):
    """Each thread's own `_Watched`; a thread looks at all of them twice a second, once there is any. A rendering costs
    two assignments and a lock, so the watcher reads the clocks: it takes a rendering to begin when it first sees it."""

    def __init__(self) -> None:
        self._watched = _Watched()
        with _lock:
            _all[self._watched.thread] = self._watched
            if not any(thread.name == WATCHER for thread in threading.enumerate()):
                threading.Thread(target=_look, name=WATCHER, daemon=True).start()

    def begin(self) -> _Watched:
        """A rendering of this thread."""
        watched = self._watched
        watched.number += 1
        watched.active = True
        return watched

    def end(self, watched: _Watched, delivered: bool) -> None:
        """It is over. An exception that is on its way is waited for, and dropped."""
        try:
            with _lock:
                watched.active = False
                told, watched.told = watched.told, False
            while told and not delivered:
                time.sleep(0.001)
        except OutOfTime:
            watched.active = watched.told = False


def _look() -> None:
    while True:
        time.sleep(LOOK_SECONDS)
        alive = {thread.ident for thread in threading.enumerate()}
        with _lock:
            for ident in _all.keys() - alive:
                del _all[ident]
            for watched in _all.values():
                if watched.active and not watched.told:
                    with suppress(OSError):  # the thread has ended just now
                        _judge(watched)


def _judge(watched: _Watched) -> None:
    """End a rendering that was seen RENDER_SECONDS ago."""
    now, (number, began) = time.clock_gettime(watched.clock), watched.seen
    if number != watched.number:
        watched.seen = (watched.number, now)
    elif now - began > RENDER_SECONDS:
        watched.told = True
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(watched.thread), ctypes.py_object(OutOfTime))


WATCHER = "template bounds"
_lock = threading.Lock()
_all: dict[int, _Watched] = {}
_watcher = _Watcher()


def _after_fork() -> None:
    """The lock may have been held, and the watcher is not here."""
    global _lock, _watcher
    _lock = threading.Lock()
    _all.clear()
    _watcher = _Watcher()


os.register_at_fork(after_in_child=_after_fork)
