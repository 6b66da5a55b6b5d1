"""A stop from outside: Ctrl-C, SIGTERM, a closed terminal. It reaches its goal whatever the program does just then.

In: the signals. Out: `Stopped` raised in the main thread, and `check`, to be called before what cannot be undone.

A signal's handler runs between any two bytecodes of the main thread, so also in a weakref callback or a `__del__`,
where Python prints the exception and goes on; and libraries catch what they should not. Therefore a thread reads the
signals too (`signal.set_wakeup_fd`), whoever handles them, and has the stop raised again four times a second until the
main thread unwinds: until a handler, run there, sees that an exception which is no `Exception` is being handled.
"""

import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
AGAIN_SECONDS = 0.25
"""Between two tries to have a stop noticed."""
PRESS_SECONDS = 0.4
"""Two SIGINTs that are nearer to one another are one: `uv run` and the terminal both send it."""
_AGAIN = signal.SIGURG
"""Asks the main thread to look whether it unwinds. Ignored by default, so one that comes late does no harm."""


class Stopped(KeyboardInterrupt):
    """Somebody wants this program to end. `number`: the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class _Listener:
    """Reads signals from its own thread. `limit`: seconds that a stop may take before the process is ended as it is;
    None where somebody else sees to that. `on_stop` is called at once with the signal, by the thread that reads it."""

    def __init__(self, limit: float | None, on_stop: Callable[[int], None]) -> None:
        self.asked: int | None = None
        self.unwound = False
        self.handed: set[int] = set()
        self.deadline = float("inf")
        self.limit = limit
        self._on_stop, self._at, self._next_look = on_stop, 0.0, 0.0
        self._main = threading.main_thread().ident
        self._lock = threading.RLock()
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)
        self._thread = threading.Thread(target=self._listen, name="stop", daemon=True)

    def start(self) -> None:
        """From now on every signal that has a Python handler is heard."""
        self._hook = sys.unraisablehook
        sys.unraisablehook = lambda given: None if self._is_stop(given.exc_value) else self._hook(given)
        self._handler = signal.signal(_AGAIN, self._look)
        self._earlier = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        self._thread.start()

    def end(self) -> None:
        """Undo `start`."""
        signal.set_wakeup_fd(self._earlier)
        signal.signal(_AGAIN, self._handler)
        sys.unraisablehook = self._hook
        self._write.close()  # ends the thread

    def hear(self, numbers: bytes) -> None:
        """Signals that came, in their order."""
        for number in numbers:
            if number not in SIGNALS or number in self.handed:
                continue
            now = time.monotonic()
            if self.asked is None:
                self.asked, self._at, self._next_look = number, now, now + AGAIN_SECONDS
                if self.limit is not None:
                    self.deadline = now + self.limit
                self._on_stop(number)
            elif number == signal.SIGINT and self.limit is not None and now - self._at > PRESS_SECONDS:
                end_now(number)

    def read_waiting(self) -> None:
        """What came and is not read yet."""
        with self._lock:
            while select.select([self._read], [], [], 0)[0]:
                if not (numbers := self._read.recv(64)):
                    return
                self.hear(numbers)

    def forget(self) -> None:
        """As if nobody had asked."""
        with self._lock:
            self.asked, self.deadline = None, float("inf")

    def _listen(self) -> None:
        while True:
            ready = select.select([self._read], [], [], AGAIN_SECONDS)[0]  # `read_waiting` may have been quicker
            with self._lock:
                if ready and select.select([self._read], [], [], 0)[0]:
                    numbers = self._read.recv(64)
                    if not numbers:
                        self._read.close()
                        return
                    self.hear(numbers)
            now = time.monotonic()
            if self.asked is not None and now > self.deadline:
                end_now(self.asked)
            if self.asked is not None and now > self._next_look and self._main is not None:
                self._next_look = now + AGAIN_SECONDS
                signal.pthread_kill(self._main, _AGAIN)

    def _look(self, number: int, frame: Any) -> None:
        if self.asked is not None and not self.unwound and not _unwinding():
            _deliver(self.asked)

    def _is_stop(self, error: BaseException | None) -> bool:
        self.read_waiting()
        return self.asked is not None and error is not None and not isinstance(error, Exception)


_listener: _Listener | None = None


def _after_fork() -> None:
    """A forked process has this one's socket: a signal that ends it would be read here."""
    global _listener
    if _listener is not None:
        signal.set_wakeup_fd(-1)
        _listener = None


os.register_at_fork(after_in_child=_after_fork)


def listen(limit: float, on_stop: Callable[[int], None]) -> None:
    """For a command: from now on the three signals stop it. `Stopped` is raised; after `limit` seconds (`allowing`
    gives more), or at a second Ctrl-C, the process ends as it is. Signals that are ignored from the start (nohup, a
    script's `&`) stay so. `on_stop` hears of the signal before it is raised. Who listened before does so no more."""
    global _listener
    leave()
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _raise)
    _listener = _Listener(limit, on_stop)
    _listener.start()


def leave() -> None:
    """Undo `listen`, but for the handlers: the caller has its own."""
    global _listener
    if _listener is not None:
        _listener.end()
        _listener = None


@contextlib.contextmanager
def insisting() -> Iterator[None]:
    """For a process whose signals somebody else handles, with exceptions that are no `Exception` (Prefect, for a flow
    run): inside, a stop that was swallowed is raised again. A process that listens already does that."""
    global _listener
    if _listener is not None or threading.current_thread() is not threading.main_thread():
        yield
        return
    _listener = _Listener(None, lambda number: None)
    _listener.start()
    try:
        yield
        check()
    finally:
        _listener.end()
        _listener = None


def asked() -> int | None:
    """The signal by which this process was asked to stop, if it was."""
    if _listener is None:
        return None
    _listener.read_waiting()
    return _listener.asked


def check() -> None:
    """Before what cannot be undone: raises what the signal raises, if there was one."""
    number = asked()
    if number is not None:
        _deliver(number)


@contextlib.contextmanager
def allowing(seconds: float) -> Iterator[None]:
    """A stop that comes inside may take this long: there is something to save."""
    if _listener is None or _listener.limit is None:
        yield
        return
    before = _listener.limit
    _listener.limit = max(before, seconds)
    try:
        yield
    finally:
        _listener.limit = before


def withdraw() -> None:
    """The stop was meant for something smaller than the program, and has been done."""
    if _listener is not None:
        _listener.forget()


def unwound(seconds: float) -> None:
    """The main thread is where it wanted to be; the rest of the way out may take `seconds`."""
    if _listener is not None:
        _listener.unwound = True
        _listener.deadline = time.monotonic() + seconds


@contextlib.contextmanager
def handed_over(number: signal.Signals, to: Callable[[], None]) -> Iterator[list[int]]:
    """Inside, `number` calls `to` and stops nothing here, unless someone else handles it (Prefect does). Yields the
    list of those that came."""
    came: list[int] = []

    def handle(number: int, _: object) -> None:
        came.append(number)
        to()

    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(number) if main else None
    ours = before in (signal.SIG_DFL, _raise)
    if ours:
        if _listener is not None:
            _listener.handed.add(number)
        signal.signal(number, handle)
    try:
        yield came
    finally:
        if ours:
            signal.signal(number, before)
            if _listener is not None:
                _listener.read_waiting()
                _listener.handed.discard(number)


@contextlib.contextmanager
def kept_from_children() -> Iterator[None]:
    """Processes that are started inside never see these signals: they end with their parent, and not by themselves."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_now(number: int) -> None:
    """End this process as it is; what it has started dies with it (`sft_core.children`)."""
    os._exit(status(number))


def status(number: int) -> int:
    """Exit status of a program that a signal stopped, as shells have it."""
    return 128 + number


def _raise(number: int, frame: Any) -> None:
    if _listener is not None:
        _listener.read_waiting()  # `on_stop` has been called before anybody logs the exception
    if not _unwinding():
        raise Stopped(number)


def _deliver(number: int) -> None:
    handler = signal.getsignal(number)
    if callable(handler) and threading.current_thread() is threading.main_thread():
        handler(number, None)
    raise Stopped(number)


def _unwinding() -> bool:
    """Whether this thread is in an `except` or `finally` that something reached which is no `Exception`."""
    error = sys.exc_info()[1]
    while error is not None:
        if not isinstance(error, Exception):
            return True
        error = error.__context__
    return False
