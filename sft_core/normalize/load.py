"""From the name of a map_fn to the function.

In: a shipped name (`alpaca`, or XTuner's `alpaca_map_fn`), `package.module:function` or `path.py:function`.
Out: the function, row -> dict. RecipeError says what is missing and what there is instead.
"""

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from sft_core.errors import RecipeError
from sft_core.normalize.map_fns import MAP_FNS

FORMS = "a shipped name, package.module:function or path.py:function"


def load_map_fn(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The function of that name.

    A user's file is run afresh each time. Modules found by name, the file's own imports too, are looked for on
    `sys.path` and then in the current directory (of a file: in its folder), and imported once a process.
    """
    shipped = shipped_name(name)
    if shipped:
        return MAP_FNS[shipped]
    where, function_name = split_name(name)
    module = _run_file(Path(where), name) if where.endswith(".py") else _import_module(where, name)
    function = getattr(module, function_name, None)
    if function is None:
        there = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise RecipeError(f"map_fn {name!r}: {where} has no function {function_name!r}{nearest(function_name, there)}")
    if not callable(function):
        raise RecipeError(f"map_fn {name!r}: {function_name} is a {type(function).__name__}, not a function")
    return function  # type: ignore[no-any-return]


def shipped_name(name: str) -> str | None:
    """The shipped map_fn that a name means, if it means one.

    >>> shipped_name("alpaca_map_fn"), shipped_name("rows.py:alpaca")
    ('alpaca', None)
    """
    plain = name.removesuffix("_map_fn")
    return plain if plain in MAP_FNS else None


def split_name(name: str) -> tuple[str, str]:
    """A user's map_fn in its two parts: module or file, and function."""
    where, colon, function = name.rpartition(":")
    if not colon or not where or not function.isidentifier():
        raise RecipeError(f"no map_fn is named {name!r}{nearest(name, list(MAP_FNS))}; write {FORMS}")
    return where, function


def nearest(name: str, known: list[str]) -> str:
    """`; did you mean ...` or the list of what there is."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(sorted(known)) or 'none'}"


def missing_file(path: Path, name: str) -> RecipeError:
    """What to say when a map_fn's file is not there."""
    there = sorted(entry.name for entry in path.parent.glob("*.py")) if path.parent.is_dir() else []
    hint = nearest(path.name, there) if there else ""
    return RecipeError(f"map_fn {name!r}: no file {path} (looked in {Path.cwd()}){hint}")


def _run_file(path: Path, name: str) -> ModuleType:
    if not path.is_file():
        raise missing_file(path, name)
    _look_in(path.resolve().parent)
    spec = importlib.util.spec_from_file_location(f"map_fn_file_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses and pickle look for it
    try:
        code = compile(path.read_bytes(), str(path), "exec")  # not the loader's: its cache goes by whole seconds
        exec(code, module.__dict__)
    except Exception as error:  # noqa: BLE001 - a user's file may raise anything
        raise RecipeError(f"map_fn {name!r}: {path} does not run: {type(error).__name__}: {error}") from error
    return module


def _import_module(module: str, name: str) -> ModuleType:
    _look_in(Path.cwd())
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise RecipeError(f"map_fn {name!r}: no module {error.name!r} here or installed; write {FORMS}") from error
    except Exception as error:  # noqa: BLE001 - a user's module may raise anything
        raise RecipeError(f"map_fn {name!r}: importing it failed: {type(error).__name__}: {error}") from error


def _look_in(folder: Path) -> None:
    """Last on the path: a user's file never hides an installed package."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
