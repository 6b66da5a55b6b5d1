"""Artifacts made shard by shard: a shard that an earlier artifact of the same step holds is taken from there.

Every shard has a key, the hash of all that decides its content. `shards.json` of an artifact lists its shards in
order; the next run of the same recipe looks its keys up there, links what it finds (checked by SHA-256) and makes the
rest. The bytes of an artifact are the same whether its shards were taken or made, and in whatever process.

What depends on a shard's place and not on its content is kept in `place`, outside of the shard: rows inserted before
it, or a file renamed, leave it as it is. Its keys:

files       the names of the source's files in it; the column `file` of its rows is an index into them
first_row   what to add to the column `row_number` of its rows
dataset     name of the data set (from normalize on)
weight      the data set's weight (from normalize on)
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, Protocol

from sft_core.artifacts import StoredFile, is_inside
from sft_core.errors import StoreError
from sft_core.fingerprint import hash_file
from sft_core.terminal import say
from sft_core.typed import read_typed

SHARDS = "shards.json"
Mapper = Callable[[Callable[[Any], "Made"], Sequence[Any]], Iterable["Made"]]
"""`map`, or one that works in other processes: results in the order of the arguments."""


@dataclass(frozen=True, slots=True)
class Made:
    """What the work on one shard gave: bytes by pattern (`train/*.parquet`; the star becomes the shard's name), and
    JSON-able facts of the shard's content."""

    files: dict[str, bytes]
    facts: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Shard:
    """One entry of `shards.json`. `name` is `part-00000`; `place` is where its rows stand in the source."""

    name: str
    key: str
    files: dict[str, StoredFile]
    facts: dict[str, Any]
    place: dict[str, Any]

    def path(self, folder: Path, pattern: str) -> Path:
        """One of its files, in its artifact's folder."""
        return folder / pattern.replace("*", self.name)


class Earlier(Protocol):
    """The shards of an earlier artifact."""

    def find(self, key: str) -> Shard | None:
        """The shard with this key."""
        ...

    def copy(self, shard: Shard, pattern: str, target: Path) -> None:
        """Put one of its files at `target`. OSError when it is not there."""
        ...


class NothingEarlier:
    """There is no earlier artifact."""

    def find(self, key: str) -> Shard | None:
        """None."""
        return None

    def copy(self, shard: Shard, pattern: str, target: Path) -> None:
        """Never called: nothing was found."""
        raise FileNotFoundError(pattern)


@dataclass
class EarlierFolder:
    """An earlier artifact in a local folder; its files are linked, or copied to another disk."""

    folder: Path
    by_key: dict[str, Shard] = field(init=False)

    def __post_init__(self) -> None:
        self.by_key = {shard.key: shard for shard in read_shard_list(self.folder)}

    def find(self, key: str) -> Shard | None:
        """The shard with this key."""
        return self.by_key.get(key)

    def copy(self, shard: Shard, pattern: str, target: Path) -> None:
        """Link one of its files, or copy it where the disk has no links."""
        source = shard.path(self.folder, pattern)
        try:
            os.link(source, target)
        except OSError:
            shutil.copyfile(source, target)


class EarlierRemote:
    """An earlier artifact at `address` of an fsspec file system; its files are downloaded."""

    def __init__(self, fs: Any, address: str) -> None:
        self._fs, self._address = fs, address
        listed = f"{address}/{SHARDS}"
        self._by_key = {shard.key: shard for shard in parse_shard_list(fs.cat_file(listed), listed)}

    def find(self, key: str) -> Shard | None:
        """The shard with this key."""
        return self._by_key.get(key)

    def copy(self, shard: Shard, pattern: str, target: Path) -> None:
        """Download one of its files."""
        self._fs.get_file(f"{self._address}/{pattern.replace('*', shard.name)}", str(target))


@dataclass(frozen=True, slots=True)
class Sharding:
    """Where shards may be taken from, and what runs the work on the others."""

    earlier: Earlier = NothingEarlier()
    mapper: Mapper = map
    on_line: Callable[[str], None] = say
    """Hears what is worth saying before the work begins."""


class ShardWriter:
    """The shards of one artifact in the making, in the order in which they come."""

    def __init__(self, out: Path, earlier: Earlier) -> None:
        self.out = out
        self.shards: list[Shard] = []
        self.reused = 0
        self._earlier = earlier

    def holds(self, key: str) -> bool:
        """Whether the earlier artifact has this shard."""
        return self._earlier.find(key) is not None

    def take(self, key: str, place: Mapping[str, Any]) -> bool:
        """Take the next shard from the earlier artifact; False where it is not there or not what was written."""
        found = self._earlier.find(key)
        if found is None:
            return False
        shard = Shard(self._next_name(), key, found.files, found.facts, dict(place))
        for pattern, entry in found.files.items():
            target = self._target(shard, pattern)
            try:
                self._earlier.copy(found, pattern, target)
            except OSError:
                return False
            if target.stat().st_size != entry.size or hash_file(target) != entry.sha256:
                target.unlink()
                return False
        self.shards.append(shard)
        self.reused += 1
        return True

    def write(self, key: str, made: Made, place: Mapping[str, Any]) -> None:
        """Write the next shard."""
        files = {name: StoredFile(len(data), hashlib.sha256(data).hexdigest()) for name, data in made.files.items()}
        shard = Shard(self._next_name(), key, files, made.facts, dict(place))
        for pattern, data in made.files.items():
            target = self._target(shard, pattern)
            target.unlink(missing_ok=True)  # a link that was refused: never write through it
            target.write_bytes(data)
        self.shards.append(shard)

    def close(self) -> None:
        """Write `shards.json`."""
        lines = [json.dumps(asdict(shard), ensure_ascii=False) for shard in self.shards]
        (self.out / SHARDS).write_text("[" + ",\n".join(lines) + "]\n", "utf-8")

    def _next_name(self) -> str:
        return f"part-{len(self.shards):05d}"

    def _target(self, shard: Shard, pattern: str) -> Path:
        target = shard.path(self.out, pattern)
        target.parent.mkdir(parents=True, exist_ok=True)
        return target


@dataclass(frozen=True, slots=True)
class ShardJob:
    """A shard to be: `argument` is what the work function takes, and must be picklable."""

    key: str
    argument: Any
    place: dict[str, Any]


def build_shards(
    jobs: Sequence[ShardJob], work: Callable[[Any], Made], writer: ShardWriter, mapper: Mapper = map
) -> None:
    """Take or make the shard of every job, in order. `work` is a function that another process can import."""
    missing = [job for job in jobs if not writer.holds(job.key)]
    made: Iterator[Made] = iter(mapper(work, [job.argument for job in missing]))
    made = chain(list(islice(made, 1)), made)  # begun: other threads or processes work while shards are taken
    wanted = {id(job) for job in missing}
    for job in jobs:
        if id(job) in wanted:
            writer.write(job.key, next(made), job.place)
        elif not writer.take(job.key, job.place):  # damaged there: made again here
            writer.write(job.key, work(job.argument), job.place)


def read_shard_list(folder: Path) -> list[Shard]:
    """The shards of an artifact, in order; none where it has no list."""
    path = folder / SHARDS
    if not path.is_file():
        return []
    return parse_shard_list(path.read_bytes(), str(path))


def parse_shard_list(text: bytes, where: str) -> list[Shard]:
    """What `shards.json` says. StoreError if that is no list of shards, or names a file outside of the folder."""
    try:
        shards = read_typed(list[Shard], text)
    except ValueError as error:
        raise StoreError(f"{where}: not a list of shards ({error}); delete that folder and run again") from None
    for shard in shards:
        if not all(is_inside(str(shard.path(Path(), name))) for name in shard.files):
            raise StoreError(f"{where}: {shard.name} names a file outside of its folder; delete that folder")
    return shards
