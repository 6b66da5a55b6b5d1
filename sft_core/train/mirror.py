"""Resumable state in an object store: each complete checkpoint is sent there while training goes on.

In: the local folder of checkpoints, named as the lease's holder is; the mirror's address. Out: `checkpoint-N/HOLDER/`
there with the same files, the run's logs up to that step in `logs/` and, last, the mark `mirrored.json` (size and
SHA-256 of each). Another machine fetches the newest marked one before it trains. What the trainer deletes goes there
too. A holder writes under its own name, and deletes what it and holders before it sent: one that lost the lease
reaches nothing of the next one's.
"""

import json
import os
import queue
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from sft_core.artifacts import StoredFile, is_inside
from sft_core.errors import StoreError
from sft_core.lease import Lease
from sft_core.store_cache import list_files
from sft_core.store_files import StoreFiles
from sft_core.terminal import say
from sft_core.train.best import best_in
from sft_core.train.checkpoints import complete_checkpoints, step_of
from sft_core.train.sound import newest_sound
from sft_core.train.spec import SAMPLES

MARK = "mirrored.json"
LOGS = "logs"
LOG_FILES = ("metrics.jsonl", SAMPLES, "train.log")
CHECKPOINT = re.compile(r"checkpoint-\d+")
LOOK_SECONDS = 2.0
SNAPSHOT = ".mirror"
"""Folder of links, so that a checkpoint that the trainer deletes is still sent whole."""


@contextmanager
def mirroring(mirror: "Mirror | None", lease: Lease, on_line: Callable[[str], None]) -> Iterator[Callable[[str], None]]:
    """Fetch what is newer in the store; then, while training runs, send what it saves, as long as the lease is held.
    Yields what is to hear the training's lines: it passes them on. Without a mirror it does no more."""
    if mirror is None:
        yield on_line
        return
    sender = _Sender(mirror, lease, on_line)

    def hear(line: str) -> None:
        sender.say_notes()
        on_line(line)

    try:
        yield hear
    except BaseException:  # also a cancelled flow's signal and Ctrl-C: raised again below
        sender.end(send=True)  # what was saved last: another machine goes on from it
        raise
    sender.end(send=False)  # the artifact will hold it


class Mirror:
    """The checkpoints of one training in the store. `work` is the folder of the lease's holder."""

    def __init__(self, files: StoreFiles, address: str, work: Path) -> None:
        work.mkdir(parents=True, exist_ok=True)
        self._files, self._address, self._work = files, address, work
        self._sent: dict[str, str] = {}
        self._kept: set[str] = set()

    @property
    def where(self) -> str:
        """The mirror's address, for people."""
        return self._files.show(self._address)

    def fetch(self, on_line: Callable[[str], None] = say) -> str | None:
        """Put the newest whole checkpoint of the store, and the best one, beside the local ones; its name, or None
        where the local one is as new. One that is not what was sent is passed over, with a line."""
        local = newest_sound(self._work, on_line)
        marked = self._marked()
        self._sent = {
            saved.name: marked[saved.name] for saved in complete_checkpoints(self._work) if saved.name in marked
        }
        for name in sorted(marked, key=lambda name: step_of(Path(name)), reverse=True):
            if local is not None and step_of(local) >= step_of(Path(name)):
                break
            if not self._fetch_checkpoint(name, marked[name], logs=True):
                on_line(f"note: {name} in {self.where} is not what was sent; passed over for the one before")
                continue
            best = best_in(self._work / name)
            beside = f"checkpoint-{best.optimizer_step}" if best is not None else name
            if beside in marked:
                self._fetch_checkpoint(beside, marked[beside], logs=False)
            return name
        return None

    def send(self) -> None:
        """Send complete checkpoints that are not there yet, the newest first; delete there what is gone here."""
        complete = sorted(complete_checkpoints(self._work), key=step_of, reverse=True)
        for checkpoint in complete:
            if checkpoint.name not in self._sent:
                self._send_checkpoint(checkpoint)
        kept = {checkpoint.name for checkpoint in complete} & self._sent.keys()
        if kept and kept != self._kept:
            self._prune(kept)
            self._kept = kept

    def _marked(self) -> dict[str, str]:
        """Who sent it, by checkpoint: of several the last holder."""
        parts = sorted(name.split("/") for name in self._files.walk(self._address) if name.endswith(f"/{MARK}"))
        return {part[0]: part[1] for part in parts if len(part) == 3 and CHECKPOINT.fullmatch(part[0])}

    def _send_checkpoint(self, checkpoint: Path) -> None:
        snapshot = self._work / SNAPSHOT / checkpoint.name
        shutil.rmtree(snapshot, ignore_errors=True)
        try:
            shutil.copytree(checkpoint, snapshot, copy_function=os.link)
        except (shutil.Error, OSError):
            return  # the trainer deletes it just now
        try:
            (snapshot / LOGS).mkdir()
            for log in LOG_FILES:
                if (self._work / log).exists():
                    shutil.copy(self._work / log, snapshot / LOGS / log)
            there = f"{self._address}/{checkpoint.name}/{self._work.name}"
            sums = list_files(snapshot)
            for name in sums:
                self._files.put_file(snapshot / name, f"{there}/{name}")
            mark = {name: asdict(entry) for name, entry in sums.items()}
            self._files.write(f"{there}/{MARK}", json.dumps(mark).encode())
            self._sent[checkpoint.name] = self._work.name
        finally:
            shutil.rmtree(snapshot, ignore_errors=True)

    def _prune(self, kept: set[str]) -> None:
        for name in self._files.names(self._address):
            if not CHECKPOINT.fullmatch(name):
                continue
            for holder in self._files.names(f"{self._address}/{name}"):
                if holder <= self._work.name and not (name in kept and self._sent[name] == holder):
                    there = f"{self._address}/{name}/{holder}"
                    self._files.remove(f"{there}/{MARK}")  # half a deletion must not look complete
                    self._files.remove_tree(there)
            if name not in kept:
                self._sent.pop(name, None)

    def _fetch_checkpoint(self, name: str, holder: str, logs: bool) -> bool:
        target = self._work / name
        if target.exists():
            return True
        part = self._work / f"fetched-{name}"
        shutil.rmtree(part, ignore_errors=True)
        there = f"{self._address}/{name}/{holder}"
        try:
            mark = json.loads(self._files.cat_file(f"{there}/{MARK}"))
            for file in mark:
                if not is_inside(file):
                    raise ValueError(file)
                (part / file).parent.mkdir(parents=True, exist_ok=True)
                self._files.get_file(f"{there}/{file}", str(part / file))
            whole = list_files(part) == {file: StoredFile(**entry) for file, entry in mark.items()}
        except (FileNotFoundError, ValueError, TypeError):
            whole = False
        if whole:
            for log in (part / LOGS).glob("*") if logs else ():
                log.replace(self._work / log.name)
            shutil.rmtree(part / LOGS, ignore_errors=True)
            part.replace(target)
            self._sent[name] = holder
        shutil.rmtree(part, ignore_errors=True)
        return whole


class _Sender:
    """Fetches, then sends from a thread. A store that does not answer is a note, and never ends the training."""

    def __init__(self, mirror: Mirror, lease: Lease, on_line: Callable[[str], None]) -> None:
        fetched = mirror.fetch(on_line)
        if fetched is not None:
            on_line(f"note: {fetched} fetched from {mirror.where}")
        self._mirror, self._lease, self._on_line = mirror, lease, on_line
        self._notes: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)
        self._thread.start()

    def end(self, send: bool) -> None:
        """Stop; before that, send the rest if asked to."""
        self._done.set()
        self._thread.join()
        if send and not self._lease.lost:
            self._send()
        self.say_notes()

    def say_notes(self) -> None:
        """Pass on what the thread has to say, in the caller's thread."""
        while not self._notes.empty():
            self._on_line(self._notes.get())

    def _run(self) -> None:
        while not (self._done.wait(LOOK_SECONDS) or self._lease.lost):
            self._send()

    def _send(self) -> None:
        try:
            self._mirror.send()
        except (StoreError, OSError) as error:
            self._notes.put(f"note: a checkpoint was not mirrored, tried again: {error}")
