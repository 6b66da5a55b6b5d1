"""Marks that say whether an answer is trained. Every map_fn reads them here; what is not understood sets the row aside.

In: a message, a turn or a row. Out: whether it is trained. The names are those in use elsewhere:

weight                               OpenAI, Mistral
train, training, train_on_turn       Axolotl's `message_field_training`, whatever it is set to in public data
loss, loss_weight, output_with_loss  ms-swift, LLaMA-Factory v1, XTuner
trainable, loss_mask                 tinker-cookbook and others
masked                               torchtune: the other way round, true is not trained

0, 1, true, false, 0.0, 1.0 and their texts mean the same under every name; null says nothing. RowError `bad_mark`: any
other value, another name that looks like a mark, two marks that differ, characters' marks (`train_detail`), a mark that
asks to train what is not the assistant's.
"""

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from sft_core.errors import RowError
from sft_core.normalize.columns import short

NAMES = frozenset(
    "weight train training trained trainable train_on_turn loss loss_weight loss_mask output_with_loss".split()
)
INVERSE = frozenset({"masked"})
WORDS = frozenset(
    "train trained training trainable trains untrained notrain loss losses lossmask lossweight noloss weight weights "
    "mask masks masked masking supervise supervised supervision learn learned learnable ignore ignored".split()
)
"""A key with one of these words in its name looks like a mark."""
CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
TRUE, FALSE = frozenset({"1", "1.0", "true"}), frozenset({"0", "0.0", "false"})
ROLES_MASKED = frozenset({"user", "human"})
"""NVIDIA NeMo's column `mask` names the role that is not trained; these never are."""
WAY_OUT = "a map_fn of your own can say it with weight 0 or 1"


def trained(message: Mapping[str, Any], where: str, key: str = "content", *, by_assistant: bool) -> bool:
    """Whether an answer is trained, by its own marks and those on the parts of its content (`key`) and on its calls.

    >>> trained({"content": "B", "train": "false"}, "messages[1]", by_assistant=True)
    False
    """
    own, inner = mark_of(message, where), _inner(message, where, key)
    if own is None and not inner:
        return by_assistant
    if not by_assistant:
        if own or any(inner):
            raise RowError("bad_mark", f"{where} is marked as trained, and is not the assistant's message; {WAY_OUT}")
        return False
    if any(mark is not None for mark in inner):
        marks = {mark is not False for mark in inner}
        if len(marks) > 1:
            raise RowError("bad_mark", f"{where}: some of its parts are marked as trained and some are not; {WAY_OUT}")
        if own is not None and own not in marks:
            raise RowError("bad_mark", f"{where} and its parts have marks that differ; {WAY_OUT}")
        return marks.pop()
    return own is not False


def is_mark(name: object) -> bool:
    """Whether a row's column of this name is read as a mark."""
    return _kind(name) in ("mark", "inverse")


def check_row(row: Mapping[str, Any]) -> None:
    """RowError for a row whose own columns say that nothing in it is trained, or say it in a way that is not known."""
    said: dict[str, bool] = {}
    for name, value in row.items():
        kind = _kind(name)
        if name == "mask" and isinstance(value, str) and value.strip().lower() in ROLES_MASKED:
            continue
        if kind == "mark" or (kind == "inverse" and value is not None):
            mark = _read(name, value, f"column {name!r}")
            said |= {} if mark is None else {name: mark}
        elif kind and _looks_like_marks(value):
            raise RowError(
                "bad_mark", f"column {name!r} looks like a mark that is not known: {short(value)}; {WAY_OUT}"
            )
    if len(set(said.values())) > 1:
        raise RowError("bad_mark", f"the columns {', '.join(said)} have marks that differ")
    if False in said.values():
        raise RowError("all_weights_zero", f"no answer is trained: the column {next(iter(said))!r} says so")


def mark_of(owner: Mapping[str, Any], where: str) -> bool | None:
    """What the marks of one mapping say, None where there are none."""
    said: dict[str, bool] = {}
    for name, kind in _marks_among(tuple(owner)):
        value = owner[name]
        if value is None:
            continue
        if kind == "other":
            if value in ([], {}):
                continue
            raise RowError("bad_mark", f"{where}.{name} looks like a mark that is not known: {short(value)}; {WAY_OUT}")
        mark = _read(name, value, f"{where}.{name}")
        if mark is not None:
            said[name] = mark
    if len(set(said.values())) > 1:
        raise RowError("bad_mark", f"{where} has marks that differ: {', '.join(said)}; {WAY_OUT}")
    return next(iter(said.values()), None)


def _read(name: str, value: object, where: str) -> bool | None:
    mark = _value(value, where)
    return not mark if mark is not None and name in INVERSE else mark


def _value(value: object, where: str) -> bool | None:
    """A mark's value.

    >>> [_value(value, "messages[1].weight") for value in (1, "0.0", "True", False, None)]
    [True, False, True, False, None]
    """
    if value is None:
        return None
    text = value.strip().lower() if isinstance(value, str) else None
    if value is True or text in TRUE or (isinstance(value, int | float) and value == 1):
        return True
    if value is False or text in FALSE or (isinstance(value, int | float) and value == 0):
        return False
    raise RowError("bad_mark", f"{where} is {short(value)}: neither 0 nor 1, true nor false; {WAY_OUT}")


@lru_cache(maxsize=4096)
def _kind(name: object) -> str | None:
    """`mark`, `inverse`, `other` for what looks like a mark, None for all else."""
    if not isinstance(name, str):
        return None
    if name in NAMES:
        return "mark"
    if name in INVERSE:
        return "inverse"
    words = re.split(r"[^a-z0-9]+", CAMEL.sub("_", name).lower())
    return "other" if WORDS.intersection(words) else None


@lru_cache(maxsize=4096)
def _marks_among(names: tuple[Any, ...]) -> tuple[tuple[str, str], ...]:
    """The keys that are marks or look like one, with their kinds; messages have few sets of keys."""
    return tuple((name, kind) for name in names if (kind := _kind(name)))


def _inner(message: Mapping[str, Any], where: str, key: str) -> list[bool | None]:
    """Marks of the parts of a content and of the calls."""
    return [mark_of(part, place) for place, part in _parts(message, where, key)]


def _parts(message: Mapping[str, Any], where: str, key: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name in (key, "tool_calls", "function_call"):
        value = message.get(name)
        if not isinstance(value, dict | list):
            continue
        for at, part in enumerate([value] if isinstance(value, dict) else value):
            if isinstance(part, dict):
                yield f"{where}.{name}[{at}]", part


def _looks_like_marks(value: object) -> bool:
    """Whether a column of a row holds marks: 0, 1, true, false, their texts, a list or a mapping of such."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return bool(value) and all(_looks_like_marks(entry) for entry in value)
    if isinstance(value, str):
        return value.strip().lower() in TRUE | FALSE
    return isinstance(value, bool) or (isinstance(value, int | float) and value in (0, 1))
