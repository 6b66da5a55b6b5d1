"""An XTuner config with a record of what was read from it, so that what was not can be named.

In: a config file. Out: `Config`, which gives values by dotted path (`model.lora.r`), collects the recipe's lines and
the remarks on what has no counterpart. Nothing of the file is run.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from sft_core.errors import RecipeError
from sft_core.recipe.xtuner.literals import Reading, Skipped, Symbol, Unread

MERGED = "XTuner writes the whole config to its work directory (work_dirs/NAME/NAME.py): import that one"

SHOWN = 160
"""Characters of a value in a remark."""


@dataclass(frozen=True, slots=True)
class Line:
    """A recipe key and the config's path, or the reason, that it came from."""

    key: str
    value: Any
    origin: str


@dataclass(frozen=True, slots=True)
class Remark:
    """Something of the config without a counterpart: what it was, and why or what to do."""

    name: str
    value: str
    why: str


class Config:
    """Sections of a config by dotted path."""

    def __init__(self, file: Path, reading: Reading) -> None:
        self.file = file
        self.values: dict[str, Any] = reading.values
        self.skipped: list[Skipped] = reading.skipped
        self.lines: list[Line] = []
        self.remarks: list[Remark] = []
        self._read: set[str] = set()
        self._closed: set[str] = set()

    def get(self, path: str) -> Any:
        """The value at `path`, None where there is none; it counts as read."""
        self._read.add(path)
        value: Any = self.values
        for part in path.split("."):
            if isinstance(value, list) and part.isdigit() and int(part) < len(value):
                value = value[int(part)]
            elif isinstance(value, dict):
                value = value.get(part)
            else:
                return None
        return value

    def literal(self, path: str) -> Any:
        """As `get`; what could not be read without running it is remarked on and None."""
        value = self.get(path)
        if not _plain(value):
            self.remark(path, value, "not a literal: it is not run; set the key by hand")
            return None
        return value

    def number(self, path: str) -> float | None:
        """As `literal`, where only a number will do."""
        value = self.literal(path)
        if value is None or (isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)):
            return value
        self.remark(path, value, "not a number; set the key by hand")
        return None

    def items(self, path: str) -> list[Any]:
        """As `get`, where only a list will do; empty where there is none."""
        value = self.get(path)
        if value is None or isinstance(value, list):
            return value or []
        self.remark(path, value, "not a list that can be read without running it; look whether it matters")
        return []

    def set(self, key: str, value: Any, origin: str) -> None:
        """One line of the recipe."""
        self.lines.append(Line(key, value, origin))

    def copy(self, key: str, path: str) -> None:
        """The value at `path` becomes the recipe's `key`, if there is one."""
        value = self.literal(path)
        if value is not None:
            self.set(key, value, path)

    def remark(self, name: str, value: Any, why: str) -> None:
        """Something without a counterpart."""
        self._closed.add(name)
        self.remarks.append(Remark(name, show(value), why))

    def settled(self, path: str) -> bool:
        """Whether a remark says something of `path` already."""
        return path in self._closed

    def unread(self, *sections: str) -> Iterator[tuple[str, Any]]:
        """Path and value of all that nobody asked for in these sections."""
        for section in sections:
            if section in self.values:
                yield from self._unread(section, self.values[section])

    def _unread(self, path: str, value: Any) -> Iterator[tuple[str, Any]]:
        if path in self._closed or (path in self._read and not any(r.startswith(f"{path}.") for r in self._read)):
            return
        entries = value.items() if isinstance(value, dict) else enumerate(value) if _has_sections(value) else None
        if entries is None:
            if path not in self._read:
                yield path, value
            return
        for key, inner in entries:
            yield from self._unread(f"{path}.{key}", inner)


def read_config(file: Path) -> Config:
    """Read a config file without running it. RecipeError if it is missing or no Python."""
    try:
        tree = ast.parse(file.read_bytes(), filename=str(file))
        reading = Reading()
        reading.run(tree.body)
    except OSError as error:
        raise RecipeError(f"{file}: cannot be read: {error.strerror}; give an XTuner config (a .py file)") from None
    except SyntaxError as error:
        raise RecipeError(f"{file}, line {error.lineno}: not Python: {error.msg}") from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise RecipeError(f"{file}: not a config: {error}") from None
    return Config(file, reading)


def last_name(value: Any) -> str:
    """The last part of an imported name, or of a dumped config's text for it; "" for anything else.

    >>> last_name(Symbol("xtuner.utils.PROMPT_TEMPLATE", "qwen_chat")), last_name("xtuner.dataset.process_hf_dataset")
    ('qwen_chat', 'process_hf_dataset')
    """
    if isinstance(value, Symbol):
        return value.name
    return value.rpartition(".")[2] if isinstance(value, str) else ""


def show(value: Any) -> str:
    """A value as the config has it, shortened, on one line."""
    if isinstance(value, dict):
        kind = last_name(value.get("type")) or "dict"
        inner = ((key, entry) for key, entry in value.items() if key not in ("type", "tokenizer"))
        text = f"{kind}({', '.join(f'{key}={show(entry)}' for key, entry in inner)})"
    elif isinstance(value, list):
        text = f"[{', '.join(show(item) for item in value)}]"
    else:
        text = str(value) if isinstance(value, Symbol | Unread) else repr(value)
    text = " ".join(text.split())
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def _plain(value: Any) -> bool:
    if isinstance(value, dict | list):
        return all(_plain(inner) for inner in (value.values() if isinstance(value, dict) else value))
    return value is None or isinstance(value, str | int | float)


def _has_sections(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(item, dict) for item in value)
