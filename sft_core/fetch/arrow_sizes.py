"""What rows of an Arrow table would take once they are decoded, told from their offsets.

In: a column. Out: bytes of each of its rows, about, shape (rows,). A small file can stand for a huge row: a value that
a dictionary, a run or a view repeats is stored once, and decoded each time.
"""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

EMPTY_BYTES = 8
"""Of a value itself: `null, ` has about as many."""
SIZED = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_binary,
    pa.types.is_large_binary,
    pa.types.is_string_view,
    pa.types.is_binary_view,
)
VIEWS = (pa.types.is_list_view, pa.types.is_large_list_view)
LISTS = (pa.types.is_list, pa.types.is_large_list, pa.types.is_map)
Sizes = NDArray[np.float64]
"""As floats: a sum of them cannot overflow."""


def row_sizes(batch: Any) -> Sizes:
    """Bytes of each row of a record batch."""
    return sum((sizes_of(column) for column in batch.columns), np.zeros(batch.num_rows))


def sizes_of(column: Any) -> Sizes:
    """Bytes of each value of an array."""
    kind = column.type
    if isinstance(kind, pa.BaseExtensionType):
        return sizes_of(column.storage)
    if any(test(kind) for test in SIZED):
        lengths = pc.binary_length(column).fill_null(0)
        return lengths.to_numpy(zero_copy_only=False).astype(float) + EMPTY_BYTES
    if pa.types.is_dictionary(kind):
        return _of_dictionary(column)
    if pa.types.is_run_end_encoded(kind):
        ends = column.run_ends.to_numpy(zero_copy_only=False)
        return sizes_of(column.values)[np.searchsorted(ends, np.arange(len(column)) + column.offset, side="right")]
    if pa.types.is_struct(kind):
        parts = (sizes_of(column.field(number)) for number in range(kind.num_fields))
        return sum(parts, np.full(len(column), float(EMPTY_BYTES)))
    if any(test(kind) for test in LISTS):
        borders = column.offsets.to_numpy()
        return _of_lists(_children(column), borders[:-1], borders[1:])
    if any(test(kind) for test in VIEWS):
        starts = column.offsets.to_numpy()[: len(column)]
        return _of_lists([column.values], starts, starts + column.sizes.to_numpy())
    if pa.types.is_fixed_size_list(kind):
        starts = (np.arange(len(column)) + column.offset) * kind.list_size
        return _of_lists([column.values], starts, starts + kind.list_size)
    return np.full(len(column), float(_plain_bytes(kind)))


def _of_dictionary(column: Any) -> Sizes:
    """Only those values are looked at that these rows have."""
    indices = column.indices.fill_null(0).cast(pa.int64()).to_numpy(zero_copy_only=False)
    used, places = np.unique(indices, return_inverse=True)
    if not len(column.dictionary):
        return np.full(len(column), float(EMPTY_BYTES))
    return sizes_of(column.dictionary.take(pa.array(used)))[places]


def _of_lists(children: list[Any], starts: Any, ends: Any) -> Sizes:
    """Sizes of lists, each from one place in its children to another; children that no list has are not looked at."""
    total = np.full(len(starts), float(EMPTY_BYTES))
    if not len(starts):
        return total
    first, last = int(starts.min()), int(ends.max())
    for child in children:
        if _is_plain(child.type):  # nulls have no bytes: there may be more of them than memory could count
            total += (ends - starts) * float(_plain_bytes(child.type))
        else:
            before = np.concatenate([[0.0], np.cumsum(sizes_of(child.slice(first, last - first)))])
            total += before[ends - first] - before[starts - first]
    return total


def _children(column: Any) -> list[Any]:
    return [column.keys, column.items] if pa.types.is_map(column.type) else [column.values]


def _is_plain(kind: Any) -> bool:
    """Whether all values of the type have the same size."""
    return not pa.types.is_nested(kind) and (pa.types.is_null(kind) or pa.types.is_primitive(kind))


def _plain_bytes(kind: Any) -> int:
    return EMPTY_BYTES + (kind.byte_width if pa.types.is_fixed_size_binary(kind) else 0)
