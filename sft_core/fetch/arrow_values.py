"""Values of Arrow columns as the JSON that they stand for, by their types.

In: a schema, and rows of it as Python values. Out: the rows; a map with texts as keys is an object, a value of the type
`arrow.json` (which `datasets` writes where types are mixed) what its text says. A struct has all of its keys in every
row, null where nobody wrote one; inside tool calls and tools, where a model would learn to write them, null keys are
left out and counted. What `arrow.json`, a map or a list holds was written, and stays.
"""

from collections.abc import Callable
from typing import Any

import pyarrow as pa

from sft_core.json_text import value_or_text

TOOL_KEYS = frozenset({"tools", "functions", "tool_calls", "function_call"})
LISTS = (
    pa.types.is_list,
    pa.types.is_large_list,
    pa.types.is_fixed_size_list,
    pa.types.is_list_view,
    pa.types.is_large_list_view,
)
TEXTS = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
Reader = Callable[[Any], Any]


class ArrowValues:
    """Rows of one schema. `decoded`: `arrow.json` is read already, as `datasets` does when it yields a row."""

    def __init__(self, schema: Any, *, decoded: bool = False) -> None:
        self._decoded, self._dropped = decoded, 0
        found = {field.name: self._reader(field.type, field.name in TOOL_KEYS) for field in schema}
        self._readers = {name: reader for name, reader in found.items() if reader}

    def row(self, row: dict[str, Any]) -> tuple[dict[str, Any], int]:
        """The row, and how many null keys were left out of it."""
        if not self._readers:
            return row, 0
        self._dropped = 0
        read = {name: self._readers[name](value) if name in self._readers else value for name, value in row.items()}
        return read, self._dropped

    def _reader(self, kind: Any, in_tools: bool) -> Reader | None:
        """What turns a value of this type into JSON's; None where it is that already."""
        if isinstance(kind, pa.BaseExtensionType):
            return _parsed if kind.extension_name == "arrow.json" and not self._decoded else None
        if pa.types.is_map(kind):
            return self._map_reader(kind, in_tools)
        if pa.types.is_struct(kind):
            return self._struct_reader(kind, in_tools)
        if any(test(kind) for test in LISTS):
            inner = self._reader(kind.value_type, in_tools)
            return inner and (lambda value: value and [inner(entry) for entry in value])
        return None

    def _map_reader(self, kind: Any, in_tools: bool) -> Reader | None:
        inner = self._reader(kind.item_type, in_tools) or (lambda value: value)
        as_object = any(test(kind.key_type) for test in TEXTS)

        def read(pairs: Any) -> Any:
            if pairs is None:
                return None
            entries = [(key, inner(value)) for key, value in pairs]
            once = as_object and len({key for key, _ in entries}) == len(entries)
            return dict(entries) if once else entries

        return read

    def _struct_reader(self, kind: Any, in_tools: bool) -> Reader | None:
        found = {field.name: self._reader(field.type, in_tools or field.name in TOOL_KEYS) for field in kind}
        readers = {name: reader for name, reader in found.items() if reader}
        if not (readers or in_tools):
            return None

        def read(struct: Any) -> Any:
            if struct is None:
                return None
            values = {name: readers[name](value) if name in readers else value for name, value in struct.items()}
            if not in_tools:
                return values
            kept = {name: value for name, value in values.items() if struct[name] is not None}
            self._dropped += len(values) - len(kept)
            return kept

        return read


def _parsed(text: Any) -> Any:
    """What a text of `arrow.json` says."""
    return value_or_text(text) if isinstance(text, str) else text
