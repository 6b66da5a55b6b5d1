"""A pickle as data: its opcodes are read one by one, and nothing that the pickle names is ever imported or called.

In: the bytes of a `data.pkl` and a function that resolves storages. Out: dicts, lists, numbers, texts and tensors.
Names of the table BUILDERS become the plain thing they stand for, names of INERT become `Inert`; any other name, any
opcode that no trainer's checkpoint has, and any key that is not a plain one is refused. Source of the opcodes:
`pickletools` in the standard library; of the names: checkpoints of XTuner 0.2, DeepSpeed 0.16 to 0.19, the Trainer.
"""

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Load = Callable[[Any], Any]
MAX_OPCODES = 20_000_000


class Refused(Exception):
    """The pickle does more than hold data, or is torn; the text says what."""


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
    shape, steps = tuple(size), tuple(stride)
    counts = (offset, *shape, *steps)
    if not isinstance(storage, Storage) or not all(type(n) is int and n >= 0 for n in counts):
        raise Refused("a tensor is described by something other than a storage and numbers")
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
    "collections.OrderedDict": lambda items=(): dict(_checked(items)),
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

CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_SET": Inert}
VALUES = frozenset(
    "BININT BININT1 BININT2 INT LONG LONG1 LONG4 FLOAT BINFLOAT UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8 STRING "
    "BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8".split()
)
PUT = frozenset({"PUT", "BINPUT", "LONG_BINPUT"})
GET = frozenset({"GET", "BINGET", "LONG_BINGET"})
IGNORED = frozenset({"PROTO", "FRAME", "STOP"})


def read_opcodes(data: bytes, load: Load) -> Any:
    """What the pickle holds. Refused if it is torn, or more than data."""
    machine = _Machine(load)
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if count > MAX_OPCODES:
                raise Refused(f"the pickle has more than {MAX_OPCODES:,} opcodes")
            machine.step(opcode.name, argument)
        (value,) = machine.stack
    except Refused:
        raise
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise Refused(f"the pickle is torn ({error or type(error).__name__})") from None
    return value


class _Machine:
    """The pickle machine's stack, marks and memo, without the power to call."""

    def __init__(self, load: Load) -> None:
        self.load = load
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        """Take one opcode."""
        if name in VALUES:
            self.stack.append(argument)
        elif name in PUT:
            self.memo[argument] = self.stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = self.stack[-1]
        elif name in GET:
            self.stack.append(self.memo[argument])
        elif name in CONSTANTS:
            self.stack.append(CONSTANTS[name])
        elif name in EMPTY:
            self.stack.append(EMPTY[name]())
        elif name == "MARK":
            self.marks.append(self.stack)
            self.stack = []
        elif name not in IGNORED:
            action = getattr(self, f"_{name.lower()}", None)
            if action is None:
                raise Refused(f"the pickle has the opcode {name}, which no checkpoint needs")
            action(argument)

    def _items(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def _pop(self, _: Any) -> None:
        self.stack.pop()

    def _tuple(self, _: Any) -> None:
        items = tuple(self._items())
        self.stack.append(items)

    def _tuple1(self, _: Any) -> None:
        self.stack[-1:] = [(self.stack[-1],)]

    def _tuple2(self, _: Any) -> None:
        self.stack[-2:] = [(self.stack[-2], self.stack[-1])]

    def _tuple3(self, _: Any) -> None:
        self.stack[-3:] = [(self.stack[-3], self.stack[-2], self.stack[-1])]

    def _list(self, _: Any) -> None:
        items = self._items()
        self.stack.append(items)

    def _dict(self, _: Any) -> None:
        items = self._items()
        self.stack.append(dict(_checked(zip(items[::2], items[1::2], strict=True))))

    def _append(self, _: Any) -> None:
        self._extend([self.stack.pop()])

    def _appends(self, _: Any) -> None:
        self._extend(self._items())

    def _additems(self, _: Any) -> None:
        self._items()

    def _setitem(self, _: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._update([key, value])

    def _setitems(self, _: Any) -> None:
        self._update(self._items())

    def _extend(self, items: list[Any]) -> None:
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(items)
        elif not isinstance(self.stack[-1], Inert):
            raise Refused("the pickle appends to something that is no list")

    def _update(self, items: list[Any]) -> None:
        if isinstance(self.stack[-1], dict):
            self.stack[-1].update(_checked(zip(items[::2], items[1::2], strict=True)))
        elif not isinstance(self.stack[-1], Inert):
            raise Refused("the pickle sets items of something that is no dict")

    def _global(self, argument: str) -> None:
        self.stack.append(_name(argument.replace(" ", ".", 1)))

    def _stack_global(self, _: Any) -> None:
        qualified, module = self.stack.pop(), self.stack.pop()
        self.stack.append(_name(f"{module:.200}.{qualified:.200}"))

    def _reduce(self, _: Any) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, Name) or not isinstance(arguments, tuple):
            raise Refused("the pickle calls something that it does not name")
        builder = BUILDERS.get(function.full)
        if builder is None and function.full not in INERT:
            raise Refused(f"the pickle calls {function.full}")
        self.stack.append(builder(*arguments) if builder else Inert())

    _newobj = _reduce

    def _build(self, _: Any) -> None:
        """Attributes (`_metadata` of a state dict, an object's state) are of no use here."""
        self.stack.pop()
        if not isinstance(self.stack[-1], (dict, Inert, torch.Tensor)):
            raise Refused("the pickle sets the state of something that has none")

    def _binpersid(self, _: Any) -> None:
        self.stack[-1:] = [self.load(self.stack[-1])]


def _name(full: str) -> Name:
    full = full.replace("__builtin__.", "builtins.", 1) if full.startswith("__builtin__.") else full
    if full not in BUILDERS and full not in INERT and full not in DTYPES:
        raise Refused(f"the pickle names {full:.120}, which no checkpoint of XTuner, DeepSpeed or the Trainer needs")
    return Name(full)


def _checked(pairs: Any) -> Any:
    """Keys must be texts or numbers: hashing a nested tuple takes time without bound."""
    for key, value in pairs:
        parts = key if isinstance(key, tuple) else (key,)
        if not all(isinstance(part, (str, int, float, type(None))) for part in parts):
            raise Refused(f"a dict has a key of type {type(key).__name__}")
        yield key, value
