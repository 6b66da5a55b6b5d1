"""JSON that a process reads back: every field is there and of its type, or it is one ValueError that says which is not.

In: a dataclass and JSON. Out: an object of it. What was written by hand, by another version or
halfway is found here, and not by what uses a number that is a text.
"""

from collections.abc import Hashable
from functools import lru_cache
from typing import Any, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

Kind = TypeVar("Kind")
VALUE_CHARACTERS = 80


def read_typed(kind: type[Kind], text: bytes | str) -> Kind:
    """An object of the dataclass (or `list[...]` of it). ValueError, in one line."""
    adapter = _adapter(cast(Hashable, kind))
    try:
        return adapter.validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"])) or "all of it"
        raise ValueError(
            f"{where[:VALUE_CHARACTERS]}: {first['msg']}: {repr(first['input'])[:VALUE_CHARACTERS]}"
        ) from None


@lru_cache(maxsize=16)
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
