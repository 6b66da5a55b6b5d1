"""What the names in a pickle stand for; none of them is looked up.

In: names of globals, and the arguments they are called with. Out: for BUILDERS the plain thing, for INERT `Inert`; any
other name is refused. Source of the names: checkpoints of XTuner 0.2, DeepSpeed 0.16 to 0.19, the Trainer.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from sft_core.terminal import one_line

MAX_DIMENSIONS = 64
"""Of a tensor; torch has no more either."""


class Refused(Exception):
    """The pickle does more than hold data, or is torn. The text says what in one line; names in it may be any text."""

    def __init__(self, why: str) -> None:
        super().__init__(one_line(why))


class Inert:
    """Stands for an object that no converter needs; arguments, state and items are dropped."""


@dataclass(frozen=True, slots=True)
class Storage:
    """Numbers on disk, mapped: 1-D."""

    values: torch.Tensor


@dataclass(frozen=True, slots=True)
class Name:
    """A global that the pickle names, not looked up."""

    full: str


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> torch.Tensor:
    """`torch._utils._rebuild_tensor_v2`, within its storage, without elements that are seen twice."""
    if not isinstance(storage, Storage) or not all(isinstance(numbers, (tuple, list)) for numbers in (size, stride)):
        raise Refused("a tensor is described by something other than a storage and numbers")
    shape, steps = tuple(size), tuple(stride)
    counts = (offset, *shape, *steps)
    if len(shape) > MAX_DIMENSIONS or not all(type(n) is int and 0 <= n < 2**63 for n in counts):
        raise Refused("a tensor is described by something other than a storage and numbers of its size")
    numel = 1
    for length in shape:
        numel *= length
    last = offset + sum((length - 1) * step for length, step in zip(shape, steps, strict=True)) if numel else 0
    if numel > len(storage.values) or (numel and last >= len(storage.values)):
        raise Refused(f"a tensor of shape {shape} does not fit its storage of {len(storage.values)} elements")
    return storage.values.as_strided(shape, steps, storage.values.storage_offset() + offset)


def _typed(function: Any, _kind: Any, arguments: Any, _state: Any) -> torch.Tensor:
    """`torch._tensor._rebuild_from_type_v2`: a tensor that carried Python attributes."""
    if function != Name("torch._utils._rebuild_tensor_v2"):
        raise Refused("a tensor is rebuilt by something other than torch._utils._rebuild_tensor_v2")
    return _tensor(*arguments)


BUILDERS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": lambda items=(): dict(checked_pairs(items)),
    "torch.Size": lambda items=(): tuple(items),
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._tensor._rebuild_from_type_v2": _typed,
    "deepspeed.runtime.zero.config.ZeroStageEnum": lambda value: value,
}
DTYPES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}
INERT = frozenset(
    {
        "_codecs.encode",
        "builtins.getattr",
        "builtins.set",
        "collections.defaultdict",
        "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.utils.tensor_fragment.fragment_address",
        "mmengine.config.config.ConfigDict",
        "mmengine.logging.history_buffer.HistoryBuffer",
        "numpy._core.multiarray._reconstruct",
        "numpy._core.multiarray.scalar",
        "numpy.core.multiarray._reconstruct",
        "numpy.core.multiarray.scalar",
        "numpy.dtype",
        "numpy.ndarray",
        "torch.Tensor",
        "torch.nn.parameter.Parameter",
        *(f"torch.{dtype}" for dtype in ("float32", "float16", "bfloat16", "float64", "int64", "int32", "bool")),
        "torch.device",
    }
)
"""`getattr` and `encode` are met as parts of a HistoryBuffer and of a numpy scalar."""


def known_name(full: str) -> Name:
    """The name, under Python 3's module; Refused if no checkpoint needs it."""
    full = full.replace("__builtin__.", "builtins.", 1) if full.startswith("__builtin__.") else full
    if full not in BUILDERS and full not in INERT and full not in DTYPES:
        raise Refused(f"the pickle names {full:.120}, which no checkpoint of XTuner, DeepSpeed or the Trainer needs")
    return Name(full)


def checked_pairs(pairs: Iterable[tuple[Any, Any]]) -> Iterator[tuple[Any, Any]]:
    """Keys must be texts or numbers: hashing a nested tuple takes time without bound."""
    for key, value in pairs:
        parts = key if isinstance(key, tuple) else (key,)
        if not all(isinstance(part, (str, int, float, type(None))) for part in parts):
            raise Refused(f"a dict has a key of type {type(key).__name__}")
        yield key, value
