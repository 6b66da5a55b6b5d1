"""Lines of a file, none of them longer than a row may be.

In: the file's bytes in pieces, each shorter than MOST_ROW_BYTES. Out: lines; of one that is longer its beginning, its
size and its hash, so that memory is bounded and no two contents look the same.
"""

import hashlib
import io
import itertools
from collections.abc import Iterable, Iterator

from sft_core.bounds import KEPT_CHARACTERS, MOST_ROW_BYTES

BOM = b"\xef\xbb\xbf"


class LongLine(bytes):
    """The beginning of a line that is over MOST_ROW_BYTES: the rest of it was counted and hashed, and is gone."""

    size: int
    sha256: str


def split_lines(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Lines, each with its LF; CR, U+0085 and U+2028 end none. Of one over MOST_ROW_BYTES a `LongLine`.

    >>> list(split_lines([b"a", b"b\\nc\\r\\n\\n", b"d"]))
    [b'ab\\n', b'c\\r\\n', b'\\n', b'd']
    """
    begun = _Begun()
    for piece in pieces:
        end = piece.rfind(b"\n") + 1
        if end:
            first = piece.index(b"\n") + 1
            begun.add(piece[:first])
            yield begun.line()
            begun = _Begun()
            yield from io.BytesIO(piece[first:end])
        begun.add(piece[end:])
    if begun.size:
        yield begun.line()


class _Begun:
    """A line whose end has not come yet."""

    def __init__(self) -> None:
        self.size, self._parts = 0, list[bytes]()
        self._head, self._digest = b"", hashlib.sha256()

    def add(self, part: bytes) -> None:
        """More of it."""
        self.size += len(part)
        self._parts.append(part)
        if self.size > MOST_ROW_BYTES:
            whole = b"".join(self._parts)
            self._head = self._head or whole[:KEPT_CHARACTERS]
            self._digest.update(whole)
            self._parts = []

    def line(self) -> bytes:
        """All of it."""
        if self.size <= MOST_ROW_BYTES:
            return b"".join(self._parts)
        line = LongLine(self._head)
        line.size, line.sha256 = self.size, self._digest.hexdigest()
        return line


def without_bom(lines: Iterable[bytes]) -> Iterator[bytes]:
    """A file's lines, the first without a byte order mark."""
    rest = iter(lines)
    first = (line if isinstance(line, LongLine) else line.removeprefix(BOM) for line in itertools.islice(rest, 1))
    return itertools.chain(first, rest)
