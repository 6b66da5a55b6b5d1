"""The headers of a Parquet file's pages: what each holds, and expands to.

In: a binary file and the metadata of a column chunk. Out: `Page`s. pyarrow shows the footer alone, and what it says of
a chunk is not what is decoded. Source of the layout: parquet.thrift (PageHeader), thrift's compact protocol.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

from sft_core.errors import SourceError

HEADER_BYTES = 1 << 16
DICTIONARY_PAGE = 2
DICTIONARY_ENCODINGS = (2, 8)
BOOLEANS, BYTE, WHOLE, DOUBLE, BINARY, STRUCT = (1, 2), 3, (4, 5, 6), 7, 8, 12
MOST_NESTED = 8


@dataclass(frozen=True, slots=True)
class Page:
    """One page: bytes once it is decompressed, values in it, whether it is the dictionary, or refers to it."""

    size: int
    values: int
    is_dictionary: bool
    by_dictionary: bool


def pages_of(file: IO[bytes], chunk: Any, label: str) -> Iterator[Page]:
    """The pages of a column chunk. SourceError if the headers are no headers."""
    at = chunk.dictionary_page_offset if chunk.has_dictionary_page else chunk.data_page_offset
    end = at + chunk.total_compressed_size
    while at < end:
        file.seek(at)
        reader = _Compact(file.read(HEADER_BYTES))
        try:
            header = reader.struct()
            data = header.get(5) or header.get(8) or header.get(7) or {}
            size, stored, values = header[2], header[3], data.get(1, 0)
            if min(size, stored, values) < 0:
                raise ValueError(size)
        except (IndexError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise SourceError(f"{label}: damaged: a page of column {chunk.path_in_schema!r} has no header") from error
        encoding = data.get(4 if 8 in header else 2)
        is_dictionary = header.get(1) == DICTIONARY_PAGE
        yield Page(size, values, is_dictionary, not is_dictionary and encoding in DICTIONARY_ENCODINGS)
        at += reader.at + stored


class _Compact:
    """Reads thrift's compact protocol; IndexError behind the end."""

    def __init__(self, data: bytes) -> None:
        self._data, self.at = data, 0

    def struct(self, nested: int = 0) -> dict[int, Any]:
        """Fields by their number."""
        fields: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            kind, step = head & 15, head >> 4
            number = number + step if step else self._signed()
            fields[number] = self._value(kind, nested + 1)
        return fields

    def _value(self, kind: int, nested: int) -> Any:
        if nested > MOST_NESTED:
            raise IndexError(nested)
        if kind in BOOLEANS:
            return kind == BOOLEANS[0]
        if kind in WHOLE:
            return self._signed()
        if kind == STRUCT:
            return self.struct(nested)
        if kind in (BYTE, DOUBLE, BINARY):
            self._skip({BYTE: 1, DOUBLE: 8}.get(kind) or self._varint())
            return None
        raise IndexError(kind)  # lists and maps: a page header has none

    def _skip(self, count: int) -> None:
        self.at += count

    def _byte(self) -> int:
        self.at += 1
        return self._data[self.at - 1]

    def _varint(self) -> int:
        value = shift = 0
        while (byte := self._byte()) & 128:
            value |= (byte & 127) << shift
            shift += 7
        return value | byte << shift

    def _signed(self) -> int:
        value = self._varint()
        return value >> 1 ^ -(value & 1)
