"""The sum itself: W + left @ right in fp32, rounded once to the dtype of W, a few rows at a time in reused buffers.

In: rows of a weight. Out: the merged rows. DoRA scales each output to its trained length (arXiv 2402.09353, eq. 5).
Against PEFT's merge in fp32 an element differs by at most (r + 4) * 2**-23 * (|W| + |left| @ |right|): both sum the
same r + 1 terms in fp32, in another order.
"""

import math

import torch

from sft_core.errors import ModelError
from sft_core.merge.placing import Edit

CHUNK_ELEMENTS = 2_000_000
"""Elements of a weight that are in work at a time: 8 MB in fp32."""


class Workspace:
    """An fp32 buffer, made once."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0)

    def take(self, rows: int, columns: int) -> torch.Tensor:
        """(rows, columns), values undefined."""
        if self._buffer.numel() < rows * columns:
            self._buffer = torch.empty(rows * columns)
        return self._buffer[: rows * columns].view(rows, columns)


def rows_at_a_time(edit: Edit) -> int:
    """Rows of a chunk. A length over columns (DoRA on a transposed weight) needs all of them at once."""
    shape = edit.place.shape
    if edit.update is not None and edit.update.magnitude is not None and edit.update.outputs == 1:
        return shape[0]
    return max(1, CHUNK_ELEMENTS // max(1, math.prod(shape[1:])))


def add_rows(name: str, edit: Edit, first: int, rows: torch.Tensor, out: torch.Tensor, space: Workspace) -> None:
    """Put the merged form of `rows`, which start at row `first` of the weight, into `out` of the base's dtype."""
    update = edit.update
    assert update is not None, "only updated weights come here"
    left = update.left[first : first + len(rows)]  # (rows, r)
    total = space.take(*rows.shape)
    total.copy_(rows)
    total.addmm_(left, update.right)
    if update.magnitude is not None:
        axis = 1 - update.outputs
        length = torch.linalg.vector_norm(total, dim=axis, keepdim=True)
        wanted = update.magnitude[first : first + len(rows)] if update.outputs == 0 else update.magnitude
        total.mul_(wanted.view(length.shape) / length)
    out.copy_(total)
    check_finite(name, out)


def check_finite(name: str, values: torch.Tensor) -> None:
    """ModelError if a value is infinite or none at all. A sum of finite ones may overflow, so it is only a hint."""
    if not math.isfinite(values.sum(dtype=torch.float32).item()) and not bool(torch.isfinite(values).all()):
        raise ModelError(
            f"base: {name}: the merged weight overflows {values.dtype}; save the base as bfloat16 or float32"
        )
