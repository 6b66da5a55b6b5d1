"""Resumable state in an object store: each complete checkpoint is sent there while training goes on.

In: the local folder of checkpoints, the mirror's address. Out: `checkpoint-N/` there with the same files and, last, the
mark `mirrored.json` (size and SHA-256 of each); the run's logs beside them. Another machine fetches the newest marked
one before it trains. What the trainer has deleted is deleted there too.
"""

import json
import os
import queue
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from sft_core.artifacts import StoredFile
from sft_core.errors import StoreError
from sft_core.lease import Lease
from sft_core.store_cache import list_files
from sft_core.store_files import StoreFiles
from sft_core.train.best import best_in
from sft_core.train.checkpoints import complete_checkpoints, newest_complete, step_of
from sft_core.train.spec import SAMPLES

MARK = "mirrored.json"
LOGS = ("metrics.jsonl", SAMPLES, "train.log")
LOOK_SECONDS = 2.0
SNAPSHOT = ".mirror"
"""Folder of links, so that a checkpoint that the trainer deletes is still sent whole."""


@contextmanager
def mirroring(mirror: "Mirror | None", lease: Lease, on_line: Callable[[str], None]) -> Iterator[Callable[[str], None]]:
    """Fetch what is newer in the store; then, while training runs, send what it saves. Yields what is to hear the
    training's lines: it passes them on, and raises StoreError once the lease is lost, which ends the training.
    Without a mirror the lease alone is watched."""
    sender = _Sender(mirror, lease, on_line) if mirror is not None else None

    def hear(line: str) -> None:
        lease.check()
        if sender is not None:
            sender.say_notes()
        on_line(line)

    try:
        yield hear
    except BaseException:  # also a cancelled flow's signal and Ctrl-C: raised again below
        if sender is not None:
            sender.end(send=True)  # what was saved last: another machine goes on from it
        raise
    if sender is not None:
        sender.end(send=False)  # the artifact will hold it


class Mirror:
    """The checkpoints of one training in the store."""

    def __init__(self, files: StoreFiles, address: str, work: Path) -> None:
        work.mkdir(parents=True, exist_ok=True)
        self._files, self._address, self._work = files, address, work
        self._sent: set[str] = set()
        self._kept: set[str] = set()

    @property
    def where(self) -> str:
        """The mirror's address, for people."""
        return self._files.show(self._address)

    def fetch(self) -> str | None:
        """Put the newest whole checkpoint of the store, and the best one, beside the local ones; its name, or None
        where the local one is as new. One that is not what was sent counts as torn."""
        local = newest_complete(self._work)
        listed = self._files.walk(self._address)
        marked = [name.removesuffix(f"/{MARK}") for name in listed if name.endswith(f"/{MARK}")]
        self._sent = {checkpoint.name for checkpoint in complete_checkpoints(self._work)} & set(marked)
        for name in sorted(marked, key=lambda name: step_of(Path(name)), reverse=True):
            if local is not None and step_of(local) >= step_of(Path(name)):
                break
            if self._fetch_checkpoint(name):
                for log in LOGS:
                    if log in listed:
                        self._files.get_file(f"{self._address}/{log}", str(self._work / log))
                best = best_in(self._work / name)
                if best is not None and f"checkpoint-{best.optimizer_step}/{MARK}" in listed:
                    self._fetch_checkpoint(f"checkpoint-{best.optimizer_step}")
                return name
        return None

    def send(self) -> None:
        """Send complete checkpoints that are not there yet, the newest first; delete there what is gone here."""
        complete = sorted(complete_checkpoints(self._work), key=step_of, reverse=True)
        for checkpoint in complete:
            if checkpoint.name not in self._sent:
                self._send_checkpoint(checkpoint)
        kept = {checkpoint.name for checkpoint in complete} & self._sent
        if kept and kept != self._kept:
            self._prune(kept)
            self._kept = kept

    def _send_checkpoint(self, checkpoint: Path) -> None:
        snapshot = self._work / SNAPSHOT / checkpoint.name
        shutil.rmtree(snapshot, ignore_errors=True)
        try:
            shutil.copytree(checkpoint, snapshot, copy_function=os.link)
        except (shutil.Error, OSError):
            return  # the trainer deletes it just now
        try:
            there = f"{self._address}/{checkpoint.name}"
            sums = list_files(snapshot)
            for log in LOGS:  # before the mark: it says that these reach up to its step
                if (self._work / log).exists():
                    shutil.copy(self._work / log, snapshot.parent / log)
                    self._files.put_file(snapshot.parent / log, f"{self._address}/{log}")
            for name in sums:
                self._files.put_file(snapshot / name, f"{there}/{name}")
            mark = {name: asdict(entry) for name, entry in sums.items()}
            self._files.write(f"{there}/{MARK}", json.dumps(mark).encode())
            self._sent.add(checkpoint.name)
        finally:
            shutil.rmtree(snapshot, ignore_errors=True)

    def _prune(self, kept: set[str]) -> None:
        for name in self._files.names(self._address):
            if name.startswith("checkpoint-") and name not in kept:
                self._files.remove(f"{self._address}/{name}/{MARK}")  # half a deletion must not look complete
                self._files.remove_tree(f"{self._address}/{name}")
                self._sent.discard(name)

    def _fetch_checkpoint(self, name: str) -> bool:
        target = self._work / name
        if target.exists():
            return True
        part = self._work / f"fetched-{name}"
        shutil.rmtree(part, ignore_errors=True)
        try:
            mark = json.loads(self._files.cat_file(f"{self._address}/{name}/{MARK}"))
            for file in mark:
                (part / file).parent.mkdir(parents=True, exist_ok=True)
                self._files.get_file(f"{self._address}/{name}/{file}", str(part / file))
            whole = list_files(part) == {file: StoredFile(**entry) for file, entry in mark.items()}
        except (FileNotFoundError, ValueError, TypeError):
            whole = False
        if whole:
            part.replace(target)
            self._sent.add(name)
        shutil.rmtree(part, ignore_errors=True)
        return whole


class _Sender:
    """Fetches, then sends from a thread. A store that does not answer is a note, and never ends the training."""

    def __init__(self, mirror: Mirror, lease: Lease, on_line: Callable[[str], None]) -> None:
        fetched = mirror.fetch()
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
