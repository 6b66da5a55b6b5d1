"""JSON that a process reads back: every field is there and of its type, or it is one ValueError that says which is not.

In: a dataclass and JSON, or a value of JSON. Out: an object of it. What was written by hand, by another version or
halfway is found here, and not by what uses a number that is a text.
"""

from functools import lru_cache
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

Kind = TypeVar("Kind")
VALUE_CHARACTERS = 80


def read_typed(kind: type[Kind], given: bytes | str | Any) -> Kind:
    """An object of the dataclass (or `list[...]` of it). ValueError, in one line."""
    adapter = _adapter(kind)
    try:
        if isinstance(given, bytes | str):
            return adapter.validate_json(given, strict=True)
        return adapter.validate_python(given, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"])) or "all of it"
        raise ValueError(
            f"{where[:VALUE_CHARACTERS]}: {first['msg']}: {repr(first['input'])[:VALUE_CHARACTERS]}"
        ) from None
    except RecursionError:
        raise ValueError("lists and objects nested too deeply") from None


@lru_cache(maxsize=16)
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
