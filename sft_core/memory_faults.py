"""Memory that ran out, of a GPU or of the machine: one line in place of a traceback, and work done by halves.

In: any exception of any library. Out: what happened; or None for what is no such fault. A GPU's comes as
torch.OutOfMemoryError, from cuBLAS and NCCL as a plain RuntimeError; a CPU's as RuntimeError or MemoryError.
"""

import gc
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from sft_core.errors import MemoryFault, SftError

TOLD = re.compile(
    r"out of memory|can't allocate memory|(?:CUBLAS|CUDNN)_STATUS_ALLOC_FAILED|cudaErrorMemoryAllocation|"
    r"Failed to CUDA calloc",
    re.IGNORECASE,
)
USED = re.compile(r"(.*? is free\.|[^\n]*)")
"""torch's sentences up to what is free; what follows advises whoever writes the program."""
ADVICE = "end other programs that use it, or take a smaller model"
T = TypeVar("T")
R = TypeVar("R")


def memory_fault(error: BaseException | None) -> str | None:
    """`CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ... is free`, for the first such fault among an error
    and its causes."""
    while error is not None:
        if isinstance(error, MemoryError):
            return "the machine is out of memory"
        if isinstance(error, RuntimeError) and TOLD.search(str(error)[:2000]):
            return USED.match(str(error)[:2000].strip())[0].rstrip(".")  # type: ignore[index]
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None


@contextmanager
def naming_memory_faults(what: str, advice: str = ADVICE) -> Iterator[None]:
    """MemoryFault that names `what`, the peak and what to do in place of any such fault inside."""
    try:
        yield
    except SftError:
        raise
    except (RuntimeError, MemoryError) as error:
        words = memory_fault(error)
        if words is None:
            raise
        raise MemoryFault(f"{what}: {words}{_peak()}; {advice}") from error


def by_halves(work: Callable[[Sequence[T]], Sequence[R]], items: Sequence[T]) -> list[R]:
    """`work(items)`, one result an item; where memory runs out, of each half by itself. Of a single item the fault goes
    on as it came."""
    try:
        return list(work(items))
    except (RuntimeError, MemoryError) as error:
        if len(items) < 2 or memory_fault(error) is None:
            raise
    release_memory()  # only here: the exception held on to the tensors
    middle = len(items) // 2
    return [*by_halves(work, items[:middle]), *by_halves(work, items[middle:])]


def release_memory() -> None:
    """Give back what nothing uses: 4-bit layers lie in reference cycles, and torch keeps freed blocks for itself."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def _peak() -> str:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return ""
    peak, total = torch.cuda.max_memory_allocated(), torch.cuda.get_device_properties().total_memory
    return f" (at most {peak / 2**30:.1f} of its {total / 2**30:.1f} GiB were this process's tensors)"
