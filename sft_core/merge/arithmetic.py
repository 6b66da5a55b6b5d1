"""The sum itself: W + left @ right in fp32, rounded once to the dtype of W, a few rows at a time in reused buffers.

In: rows of a weight. Out: the merged rows. DoRA scales each output to its trained length (arXiv 2402.09353, eq. 5).

On an fp32 base an element of a LoRA merge is within 2 * (r + 4) * 2**-24 * (|W| + scale * |B| @ |A|) of PEFT's
merge_and_unload, and within half of that of the exact sum: no term is rounded more than r + 3 times (scale, scaled
factor, product, r additions) on either side, whatever the order (Higham, Accuracy and Stability, section 3.1).
"""

import math
import threading

import torch

from sft_core.convert.trained import all_finite
from sft_core.errors import ModelError
from sft_core.merge.placing import Edit

CHUNK_ELEMENTS = 2**22
"""Elements of a weight in work at a time: 16 MB in fp32. Fewer cost more calls, in which threads wait for one another;
more fall out of the last cache."""


class Workspace(threading.local):
    """Buffers of a thread, by name; each grows to the largest size asked for."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of `shape`, values undefined; valid until the name is taken again."""
        nbytes = math.prod(shape) * dtype.itemsize
        if name not in self._buffers or len(self._buffers[name]) < nbytes:
            self._buffers[name] = torch.empty(nbytes, dtype=torch.uint8)
        return self._buffers[name][:nbytes].view(dtype).view(shape)


def needs_all_rows(edit: Edit) -> bool:
    """True for a length over columns: DoRA on a transposed weight."""
    return edit.update is not None and edit.update.magnitude is not None and edit.update.outputs == 1


def rows_at_a_time(edit: Edit) -> int:
    """Rows of a chunk."""
    shape = edit.place.shape
    return shape[0] if needs_all_rows(edit) else max(1, CHUNK_ELEMENTS // max(1, math.prod(shape[1:])))


def add_rows(edit: Edit, first: int, rows: torch.Tensor, out: torch.Tensor, space: Workspace) -> None:
    """Put the merged form of `rows`, which start at row `first` of the weight, into `out` of the base's dtype."""
    update = edit.update
    assert update is not None, "only updated weights come here"
    total = space.take("sum", tuple(rows.shape), torch.float32)
    total.copy_(rows)
    total.addmm_(update.left[first : first + len(rows)], update.right)  # (rows, r) @ (r, columns)
    if update.magnitude is not None:
        axis = 1 - update.outputs
        length = torch.linalg.vector_norm(total, dim=axis, keepdim=True)
        wanted = update.magnitude[first : first + len(rows)] if update.outputs == 0 else update.magnitude
        total.mul_(wanted.view(length.shape) / length)
    out.copy_(total)


def check_finite(name: str, rounded: torch.Tensor) -> None:
    """ModelError unless all values are finite, as they will be stored."""
    if not all_finite(rounded):
        raise ModelError(
            f"base: {name}: the merged weight overflows {rounded.dtype}, or the base holds NaN or infinity there; save "
            "a sound base as bfloat16 or float32"
        )
