"""A pickle as data: its opcodes are read one by one, and nothing that the pickle names is ever imported or called.

In: the bytes of a `data.pkl` and a function that resolves storages. Out: dicts, lists, numbers, texts and tensors. Any
opcode that no trainer's checkpoint has, any name but those of `names`, and any key that is not a plain one is refused.
Source of the opcodes: `pickletools` in the standard library.
"""

import pickletools
from collections.abc import Callable
from typing import Any

import torch

from sft_core.convert.names import BUILDERS, INERT, Inert, Name, Refused, checked_pairs, known_name

Load = Callable[[Any], Any]
MAX_OPCODES = 20_000_000
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
        self.stack.append(dict(checked_pairs(zip(items[::2], items[1::2], strict=True))))

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
            self.stack[-1].update(checked_pairs(zip(items[::2], items[1::2], strict=True)))
        elif not isinstance(self.stack[-1], Inert):
            raise Refused("the pickle sets items of something that is no dict")

    def _global(self, argument: str) -> None:
        self.stack.append(known_name(argument.replace(" ", ".", 1)))

    def _stack_global(self, _: Any) -> None:
        qualified, module = self.stack.pop(), self.stack.pop()
        self.stack.append(known_name(f"{module:.200}.{qualified:.200}"))

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
