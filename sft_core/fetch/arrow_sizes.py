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
        return _filled(pc.binary_length(column)) + EMPTY_BYTES
    if pa.types.is_fixed_size_binary(kind):
        return np.full(len(column), float(kind.byte_width + EMPTY_BYTES))
    if pa.types.is_dictionary(kind):
        sizes = sizes_of(column.dictionary)
        return np.append(sizes, EMPTY_BYTES)[_indices(column.indices, len(sizes))]
    if pa.types.is_run_end_encoded(kind):
        ends = column.run_ends.to_numpy(zero_copy_only=False)
        return sizes_of(column.values)[np.searchsorted(ends, np.arange(len(column)) + column.offset, side="right")]
    if pa.types.is_struct(kind):
        parts = (sizes_of(column.field(number)) for number in range(kind.num_fields))
        return sum(parts, np.full(len(column), float(EMPTY_BYTES)))
    if any(test(kind) for test in LISTS):
        values = _values(column)
        borders = column.offsets.to_numpy()
        return _between(values, borders[:-1], borders[1:])
    if any(test(kind) for test in VIEWS):
        starts = column.offsets.to_numpy()[: len(column)]
        return _between(sizes_of(column.values), starts, starts + column.sizes.to_numpy())
    if pa.types.is_fixed_size_list(kind):
        starts = (np.arange(len(column)) + column.offset) * kind.list_size
        return _between(sizes_of(column.values), starts, starts + kind.list_size)
    return np.full(len(column), float(EMPTY_BYTES))


def _values(column: Any) -> Sizes:
    if pa.types.is_map(column.type):
        return sizes_of(column.keys) + sizes_of(column.items)
    return sizes_of(column.values)


def _between(sizes: Sizes, starts: Any, ends: Any) -> Sizes:
    before = np.concatenate([[0.0], np.cumsum(sizes)])
    return before[ends] - before[starts] + EMPTY_BYTES


def _filled(lengths: Any) -> Sizes:
    return lengths.fill_null(0).to_numpy(zero_copy_only=False).astype(float)


def _indices(indices: Any, missing: int) -> Any:
    return pc.fill_null(indices.cast(pa.int64()), missing).to_numpy(zero_copy_only=False)
