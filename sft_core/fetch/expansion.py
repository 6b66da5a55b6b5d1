"""Bytes that are inflated piece by piece, up to a bound.

In: an opened compressed file. Out: a reader of what is in it; SourceError once that is more than a file of its size may
hold (`bounds.allowed`), or asks for more memory than any common writer does. Nothing is inflated ahead of the reader.
"""

import io
import lzma
from collections.abc import Callable, Iterator
from typing import IO, Any, cast

from sft_core.bounds import DICTIONARY_BYTES, MOST_EXPANSION, allowed
from sft_core.errors import SourceError

PIECE_BYTES = 1 << 18


def bounded(plain: Callable[[int], bytes], size: int, name: str) -> IO[bytes]:
    """A reader of what `plain(count)` yields, a bounded piece a call; `size`: bytes of the compressed file."""
    return cast(IO[bytes], io.BufferedReader(_Counted(plain, size, name), PIECE_BYTES))


def xz_pieces(file: IO[bytes]) -> Callable[[int], bytes]:
    """What is in an .xz or .lzma file, by pieces. `lzma.open` has no bound on the memory that a file asks for."""
    pieces = _xz(file)
    return lambda _: next(pieces, b"")


class Expansion:
    """Counts what came out of a file of `size` bytes."""

    def __init__(self, size: int, name: str) -> None:
        self._left, self._size, self._name = allowed(size), size, name

    def add(self, count: int) -> None:
        """SourceError if it is too much now."""
        self._left -= count
        if self._left < 0:
            raise SourceError(
                f"{self._name}: its {self._size:,} bytes expand to more than {allowed(self._size):,}, over "
                f"{MOST_EXPANSION} times as many; no real rows do that. If these do, unpack or write them plainly"
            )


class _Counted(io.RawIOBase):
    def __init__(self, plain: Callable[[int], bytes], size: int, name: str) -> None:
        self._plain, self._expansion, self._rest = plain, Expansion(size, name), memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._rest:
            piece = self._plain(len(buffer))
            self._expansion.add(len(piece))
            self._rest = memoryview(piece)
        count = min(len(self._rest), len(buffer))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count


def _xz(file: IO[bytes]) -> Iterator[bytes]:
    """Streams one after another, with padding between them."""
    packed = file.read(PIECE_BYTES)
    while packed:
        reader = lzma.LZMADecompressor(memlimit=DICTIONARY_BYTES)
        while not reader.eof:
            if reader.needs_input and not packed and not (packed := file.read(PIECE_BYTES)):
                raise EOFError("Compressed file ended before the end-of-stream marker was reached")
            piece, packed = reader.decompress(packed, PIECE_BYTES), b""
            if piece:
                yield piece
        packed = reader.unused_data.lstrip(b"\0")
        while not packed and (read := file.read(PIECE_BYTES)):
            packed = read.lstrip(b"\0")
