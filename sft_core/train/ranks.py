"""Signs of life of a run's ranks: one small file each in a folder that every machine sees.

In: `<checkpoints>/ranks/<name>`, written every few seconds by a thread of each rank. Out: which rank is silent, or that
none moves on. Only changes are looked at, timed by the reader, so clocks of machines need not agree. A file keeps its
size and is overwritten in place: a full disk does not stop it.
"""

import atexit
import json
import os
import re
import socket
import threading
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Self

RANKS = "ranks"
"""Folder of the files, below the folder of checkpoints."""
BEAT_SECONDS = 5.0
PAUSE_SECONDS = 30.0
"""Between two looks of a watch: it was stopped itself (a suspended job), and that time counts for nobody."""
RECORD_BYTES = 256
COLLECTIVES = re.compile("gloo|NCCL|TCPStore")
"""In the text of what torch's collectives raise as a plain RuntimeError."""
PREPARING, TRAINING, SAVING, ENDED = "preparing", "training", "saving", "ended"


@dataclass(frozen=True, slots=True, kw_only=True)
class Beat:
    """One sign of life. `moves`: micro-batches and checkpoints done; `token` says which start of the run it is."""

    count: int = 0
    moves: int = 0
    state: str = PREPARING
    token: str = ""
    pid: int = 0
    host: str = ""

    def as_bytes(self) -> bytes:
        """JSON, padded to RECORD_BYTES."""
        return json.dumps(asdict(self)).encode().ljust(RECORD_BYTES - 1) + b"\n"

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """The newest beat, or None: no file, or read while it was written."""
        try:
            return cls(**json.loads(path.read_bytes()))
        except (OSError, ValueError, TypeError):
            return None


class Heart:
    """Writes beats to `folder/name` from a thread until `end`. It beats on while the main thread waits."""

    def __init__(self, folder: Path, name: str, limit: float) -> None:
        """Silence of `limit` seconds will be a fault."""
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._beat = Beat(pid=os.getpid(), host=socket.gethostname()[:64])
        self._path = folder / name
        self._path.touch()
        self._every = min(BEAT_SECONDS, limit / 10)
        self._done, self._lock = threading.Event(), threading.Lock()
        self._write()
        atexit.register(self.end)
        threading.Thread(target=self._run, name="heart", daemon=True).start()

    def say(self, state: str | None = None, moved: bool = False, token: str | None = None) -> None:
        """Change what the next beat says; a new state or token is written at once."""
        with self._lock:
            beat = self._beat
            self._beat = replace(
                beat, state=state or beat.state, token=token or beat.token, moves=beat.moves + int(moved)
            )
            changed = (beat.state, beat.token) != (self._beat.state, self._beat.token)
        if changed:
            self._write()

    def end(self) -> None:
        """The last beat: silence is no fault from here on."""
        self._done.set()
        self.say(state=ENDED)

    def _run(self) -> None:
        while not self._done.wait(self._every):
            self._write()

    def _write(self) -> None:
        with self._lock, suppress(OSError):  # silence is what tells the others
            self._beat = replace(self._beat, count=self._beat.count + 1)
            with self._path.open("r+b") as file:  # closed each time: only then does NFS show it to others
                file.write(self._beat.as_bytes())


@dataclass(slots=True)
class _Seen:
    beat: Beat | None
    changed: float
    moved: float
    counts: bool
    """Whether its silence is one: a rank of this machine, or one that was seen to beat."""


class RankWatch:
    """What the parent of some ranks knows of all of them. `now` is in seconds of one monotonic clock."""

    def __init__(self, folder: Path, ranks: int, local: Iterable[int], limit: float, now: float) -> None:
        """`limit` is the time that ranks wait for one another; this watch, which can name a rank, speaks first."""
        self._folder, self._silence, self._still = folder, limit / 2, limit
        self._begin = 2 * limit  # machines first wait for one another
        self._looked = now
        own = set(local)
        for rank in own:
            (folder / str(rank)).unlink(missing_ok=True)  # of an earlier start
        self._seen = {rank: _Seen(Beat.read(folder / str(rank)), now, now, rank in own) for rank in range(ranks)}

    def fault(self, now: float) -> str | None:
        """What is wrong, naming ranks; None while all is well. To be asked every second or so."""
        pause, self._looked = now - self._looked, now
        if pause > PAUSE_SECONDS:
            for seen in self._seen.values():
                seen.changed, seen.moved = seen.changed + pause, seen.moved + pause
        for rank, seen in self._seen.items():
            beat = Beat.read(self._folder / str(rank))
            if beat is not None and beat != seen.beat:
                moved = now if seen.beat is None or beat.moves != seen.beat.moves else seen.moved
                self._seen[rank] = _Seen(beat, now, moved, True)
        live = {r: s for r, s in self._seen.items() if s.counts and (s.beat is None or s.beat.state != ENDED)}
        silent = {r: s for r, s in live.items() if now - s.changed > (self._silence if s.beat else self._begin)}
        if silent:
            names = ", ".join(_name(rank, seen) for rank, seen in silent.items())
            seconds = now - min(seen.changed for seen in silent.values())
            return f"no sign of life for {seconds:.0f} s from {names}: stopped, stuck on a disk, or the machine is gone"
        training = [s for s in live.values() if s.beat is not None and s.beat.moves and s.beat.state == TRAINING]
        if training and len(training) == len(live) and now - max(s.moved for s in training) > self._still:
            return f"no rank has moved on for {self._still:.0f} s; {self.behind()}"
        return None

    def behind(self) -> str:
        """The ranks that have done least."""
        beats = {rank: seen.beat.moves if seen.beat else 0 for rank, seen in self._seen.items() if seen.counts}
        least = min(beats.values(), default=0)
        names = [_name(rank, self._seen[rank]) for rank, moves in beats.items() if moves == least]
        return (
            f"furthest behind: {', '.join(names)}" if len(names) < len(beats) or len(names) == 1 else "none is behind"
        )


def waited_in_vain(error: Exception) -> bool:
    """Whether this is what a rank gets that waits for a lost one."""
    from torch.distributed import DistError  # loaded by now, where ranks wait

    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and bool(COLLECTIVES.search(str(error))))


def _name(rank: int, seen: _Seen) -> str:
    if seen.beat is None:
        return f"rank {rank} (which never began)"
    return f"rank {rank} (process {seen.beat.pid} on {seen.beat.host}, after {seen.beat.moves} micro-batches)"
