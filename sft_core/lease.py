"""A lease: one holder at a time for a piece of work, among machines that share nothing but the store.

In: a folder of the store. Out: a `Lease` that is renewed from a thread until it is released. A holder that dies is
replaced after LEASE_SECONDS; at once, where its process is seen to be gone (the same machine).

Each holder writes a file of its own, `00000001.json`, `00000002.json`, ..., created exclusively; the highest number
holds. So taking over needs no compare-and-swap, and a holder that was suspended sees by a higher number that it lost.
A waiter times the silence by its own clock: clocks of machines need not agree. No look at a lease keeps a process from
being suspended right after it. Therefore a holder writes only below a folder of its own `name`, which nobody has again.
(Fencing tokens: M. Kleppmann, How to do distributed locking, 2016.)
"""

import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from sft_core.errors import SftError, StoreError
from sft_core.store_files import StoreFiles
from sft_core.terminal import say
from sft_core.typed import read_typed

LEASE_SECONDS = 60.0
"""Silence after which a holder counts as dead. Renewed four times as often."""
MOST_SECONDS = 3600.0
"""A lease that asks for more is none of ours."""
LOOK_SECONDS = 2.0
SAY_SECONDS = 60.0
NAME = re.compile(r"\d{8}\.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """What a lease's file says. `machine` is the boot and the process namespace, `born` the process's start."""

    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    machine: str = field(default_factory=lambda: _machine())
    born: str = field(default_factory=lambda: _born(os.getpid()))
    token: str = field(default_factory=lambda: uuid.uuid4().hex)
    seconds: float
    renewed: str = ""
    beat: int = 0
    released: bool = False

    def as_bytes(self) -> bytes:
        """JSON."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_bytes(cls, text: bytes) -> Self | None:
        """Back from `as_bytes`; None for what is no lease."""
        try:
            holder = read_typed(cls, text)
            renewed = datetime.fromisoformat(holder.renewed)
        except ValueError:
            return None
        return holder if renewed.tzinfo is not None and 0 < holder.seconds <= MOST_SECONDS else None

    @property
    def gone(self) -> bool:
        """Whether it let go, or its process is known to have ended: only on the machine that it ran on."""
        return self.released or (bool(self.machine) and self.machine == _machine() and _born(self.pid) != self.born)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class Lease:
    """Held from its making on. `check` raises once another holder has taken over, by what the thread saw last, within a
    quarter of the lease; `confirm` looks now."""

    def __init__(self, files: StoreFiles, folder: str, number: int, holder: Holder, what: str) -> None:
        self._files, self._folder, self._number, self._holder, self._what = files, folder, number, holder, what
        self._lost, self._done = threading.Event(), threading.Event()
        self._lock = threading.Lock()
        self._forgotten = False
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    @property
    def name(self) -> str:
        """Of this holder alone; names sort as the holders came."""
        return f"{self._number:08d}-{self._holder.token[:8]}"

    @property
    def seconds(self) -> float:
        """Silence after which another one takes over."""
        return self._holder.seconds

    @property
    def lost(self) -> bool:
        """Whether another holder was seen to have taken over."""
        return self._lost.is_set()

    def look(self) -> bool:
        """Whether it is still held, asked of the store now. StoreError if the store does not say."""
        with self._lock:
            number, text = _read(self._files, self._folder)
            holder = Holder.from_bytes(text) if text is not None else None
            if number != self._number or holder is None or holder.token != self._holder.token:
                self._lost.set()
        return not self.lost

    def confirm(self) -> None:
        """StoreError if the lease was lost, or if the store does not say."""
        self.look()
        self.check()

    def check(self) -> None:
        """StoreError if the lease was seen to be lost."""
        if self.lost:
            raise self.fault()

    def fault(self) -> StoreError:
        """What a loser says."""
        return StoreError(
            f"{self._what}: this process was silent for over {self._holder.seconds:.0f} s, and another one took "
            "over; it goes on with the work, and this run can be started again to wait for it"
        )

    def forget(self) -> None:
        """The work is done for good: `release` leaves nothing behind."""
        self._forgotten = True

    def release(self) -> None:
        """Let the next one in."""
        self._done.set()
        self._thread.join()
        with suppress(StoreError, OSError):  # it will run out
            if not self.lost and self.look():
                if self._forgotten:
                    self._files.remove(_path(self._folder, self._number))
                else:
                    self._write(released=True)

    def _renew(self) -> None:
        while not self._done.wait(self._holder.seconds / 4):
            with suppress(StoreError, OSError):  # silence is what tells the others
                if not self.look():
                    return
                self._write(released=False)

    def _write(self, released: bool) -> None:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self._holder = replace(self._holder, renewed=now, beat=self._holder.beat + 1, released=released)
        with self._lock:
            self._files.write(_path(self._folder, self._number), self._holder.as_bytes())


@contextmanager
def hold(files: StoreFiles, folder: str, what: str, on_line: Callable[[str], None] = say) -> Iterator[Lease]:
    """Wait until the lease in `folder` is free, then hold it. `what` is named in lines and errors. What fails inside
    once the lease was lost, failed of that: StoreError says so."""
    holder = Holder(seconds=LEASE_SECONDS, renewed=datetime.now(UTC).isoformat(timespec="seconds"))
    seen: bytes | None = None
    changed, said = time.monotonic(), -SAY_SECONDS
    while True:
        newest, text = _read(files, folder)
        if text != seen:
            seen, changed = text, time.monotonic()
        other = Holder.from_bytes(text) if text is not None else None
        silent = time.monotonic() - changed
        if newest == 0 or (other and other.gone) or silent > (other.seconds if other else LEASE_SECONDS):
            if files.create(_path(folder, newest + 1), holder.as_bytes()):
                break
        elif time.monotonic() - said >= SAY_SECONDS:
            said = time.monotonic()
            on_line(
                f"note: {what} is held by {other}; waiting for it to end, or to be silent for {LEASE_SECONDS:.0f} s"
            )
        time.sleep(LOOK_SECONDS if newest else 0)
    if newest and other and not other.released:
        on_line(f"note: {what} was held by {other}, which is gone; taking over")
    lease = Lease(files, folder, newest + 1, holder, what)
    try:
        for number in range(1, newest + 1)[-3:]:
            files.remove(_path(folder, number))
        yield lease
    except (SftError, OSError) as error:
        with suppress(StoreError, OSError):
            lease.look()
        if lease.lost:
            raise lease.fault() from error
        raise
    finally:
        lease.release()


def live_holder(files: StoreFiles, folder: str, now: datetime) -> Holder | None:
    """Who seems to hold the lease, by this machine's clock: renewed within ten times its length."""
    _, text = _read(files, folder)
    holder = Holder.from_bytes(text) if text is not None else None
    if holder is None or holder.gone:
        return None
    renewed = datetime.fromisoformat(holder.renewed)
    return holder if (now - renewed).total_seconds() < 10 * holder.seconds else None


def _read(files: StoreFiles, folder: str) -> tuple[int, bytes | None]:
    newest = max(_numbers(files, folder), default=0)
    if newest == 0:
        return 0, None
    try:
        return newest, files.cat_file(_path(folder, newest))
    except FileNotFoundError:  # taken over or removed between the two looks
        return newest, None


def _numbers(files: StoreFiles, folder: str) -> list[int]:
    return [int(name[:8]) for name in files.names(folder) if NAME.fullmatch(name)]


def _path(folder: str, number: int) -> str:
    return f"{folder}/{number:08d}.json"


def _machine() -> str:
    """This boot of this machine and this namespace of processes; empty where the system does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def _born(pid: int) -> str:
    """When a process of this machine was started, in clock ticks since boot; empty if there is none (proc(5), stat)."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state in "ZX" else rest[18]
