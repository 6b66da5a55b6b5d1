"""Where a source is cut into shards: files into groups, lines and rows into blocks.

In: a source's files in order, or the lines or rows of one. Out: groups of files, blocks of lines or rows. Every border
depends on the content around it alone, so that a file or row that comes or goes moves no other border.
"""

import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from sft_core.fetch.source import SourceFile
from sft_core.shard_rows import Cutter

SMALL_FILE_BYTES = 1_000_000
"""A file of so many bytes, as it is stored, shares no shard with another."""
GROUP_BYTES = 4_000_000
"""About so many bytes of small files make a group."""
MOST_GROUP_BYTES = 4 * GROUP_BYTES
LEAST_FILE_BYTES = 8_000
"""What a file counts at least: opening it takes its time."""
Item = TypeVar("Item")


def is_large(file: SourceFile) -> bool:
    """Whether it shares no shard with another file."""
    return file.size >= SMALL_FILE_BYTES


def group_files(files: Iterable[SourceFile]) -> Iterator[list[SourceFile]]:
    """Files in order: large ones alone, small ones together.

    A small file ends its group with a probability that grows with its size, drawn from the CRC-32 of its SHA-256.
    """
    group: list[SourceFile] = []
    total = 0
    for file in files:
        if is_large(file):
            yield from filter(None, (group, [file]))
            group, total = [], 0
            continue
        size = max(file.size, LEAST_FILE_BYTES)
        group.append(file)
        total += size
        if zlib.crc32(file.sha256.encode()) % GROUP_BYTES < size or total >= MOST_GROUP_BYTES:
            yield group
            group, total = [], 0
    if group:
        yield group


def cut(items: Iterable[Item], content: Callable[[Item], bytes]) -> Iterator[list[Item]]:
    """Lines or rows in blocks, a block a shard. `content` is what of an item decides borders."""
    cutter, block = Cutter(), list[Item]()
    for item in items:
        block.append(item)
        if cutter.ends_after(content(item)):
            yield block
            block = []
    if block:
        yield block


def mark_last(blocks: Iterable[Item]) -> Iterator[tuple[Item, bool]]:
    """Each with whether it is the last.

    >>> list(mark_last("ab"))
    [('a', False), ('b', True)]
    """
    rest = iter(blocks)
    for held in rest:
        for block in rest:
            yield held, False
            held = block
        yield held, True
