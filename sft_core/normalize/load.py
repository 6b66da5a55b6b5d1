"""From the name of a map_fn to the function.

In: a shipped name (`alpaca`, or XTuner's `alpaca_map_fn`), `package.module:function` or `path.py:function`.
Out: the function, row -> dict. RecipeError says what is missing and what there is instead, or that code from there is
not to be run (`sft_core.trust`).
"""

import difflib
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from sft_core.errors import RecipeError
from sft_core.normalize.map_fns import ALIASES, MAP_FNS
from sft_core.own_packages import NAMES, also_found_in, find_collision, hold_free_names
from sft_core.trust import require_code_file, require_module, require_own

_LOADED: dict[str, dict[str, Any]] = {}
"""Who a map_fn was (`map_fn_source`) when this process imported it."""
FORMS = "a shipped name, package.module:function or path.py:function"


def load_map_fn(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The function of that name.

    A user's file is run afresh each time, and so are the modules beside it that it imports at its top: what runs is
    what `map_fn_source` reads. `package.module` is looked for on `sys.path`, then in the current directory, and stays
    as it is until the process ends: RecipeError where its source was edited meanwhile. It may be in a package that has
    the name of one of ours (`own_packages`).
    """
    shipped = shipped_name(name)
    if shipped:
        return MAP_FNS[shipped]
    where, function_name = split_name(name)
    if where.endswith(".py"):
        module = _run_file(Path(where), name)
    else:
        module = _import_module(where, name)
        _refuse_edited(name)
    function = getattr(module, function_name, None)
    if function is None:
        there = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise RecipeError(f"map_fn {name!r}: {where} has no function {function_name!r}{nearest(function_name, there)}")
    if not callable(function):
        raise RecipeError(f"map_fn {name!r}: {function_name} is a {type(function).__name__}, not a function")
    require_own(function, module.__name__, f"map_fn {name!r}")
    return function  # type: ignore[no-any-return]


def shipped_name(name: str) -> str | None:
    """The shipped map_fn that a name means, if it means one.

    >>> shipped_name("alpaca_map_fn"), shipped_name("rows.py:alpaca")
    ('alpaca', None)
    """
    plain = ALIASES.get(name.removesuffix("_map_fn"), name.removesuffix("_map_fn"))
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
    require_code_file(path, f"map_fn {name!r}")
    module = ModuleType(f"map_fn_file_{path.stem}")
    module.__file__ = str(path.resolve())
    sys.modules[module.__name__] = module  # where dataclasses and pickle look for it
    try:
        code = compile(path.read_bytes(), module.__file__, "exec")
        with _imports_from(path.resolve().parent):
            exec(code, module.__dict__)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a user's file may raise anything
        raise RecipeError(f"map_fn {name!r}: {path} does not run: {type(error).__name__}: {error}") from error
    return module


@contextmanager
def _imports_from(folder: Path) -> Iterator[None]:
    """Imports find the modules of `folder` first, read them from disk, and leave `sys.modules` as it was."""
    beside = {entry.stem for entry in folder.iterdir() if entry.suffix == ".py" or (entry / "__init__.py").is_file()}
    strange = {top for top in beside - sys.stdlib_module_names if top in sys.modules and not _lies_in(top, folder)}
    hidden = {key: sys.modules.pop(key) for key in list(sys.modules) if key.partition(".")[0] in strange}
    before = set(sys.modules)
    known = {key.partition(".")[0] for key in before}
    writes_bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # a cache that goes by whole seconds
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        with also_found_in(folder):
            yield
    finally:
        sys.dont_write_bytecode = writes_bytecode
        sys.path.remove(str(folder))
        for key in [key for key in sys.modules if key not in before]:
            top = key.partition(".")[0]
            if top in beside - known or (top in NAMES and _lies_in(key, folder)):
                del sys.modules[key]
        sys.modules.update(hidden)


def _lies_in(module: str, folder: Path) -> bool:
    file = getattr(sys.modules[module], "__file__", None)
    return file is not None and folder in Path(file).resolve().parents


def _import_module(module: str, name: str) -> ModuleType:
    refuse_collision(module, name)
    if "" not in sys.path:
        sys.path.append("")  # the current folder, last: it hides nothing; it stays, for imports inside functions
    hold_free_names()
    require_module(module, f"map_fn {name!r}")
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        missing = error.name or module
        for end in range(missing.count(".") + 1):
            refuse_collision(missing.rsplit(".", end)[0], name)
        if isinstance(error, ModuleNotFoundError):
            raise RecipeError(f"map_fn {name!r}: no module {error.name!r} here or installed; write {FORMS}") from error
        raise RecipeError(f"map_fn {name!r}: importing it failed: {type(error).__name__}: {error}") from error
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a user's module may raise anything
        raise RecipeError(f"map_fn {name!r}: importing it failed: {type(error).__name__}: {error}") from error
    require_module(module, f"map_fn {name!r}")  # what was loaded, whatever the search before found
    return found


def _refuse_edited(name: str) -> None:
    """RecipeError if the source of an imported map_fn is not what it was when this process loaded it first: the
    process would run the old one under the new one's name."""
    from sft_core.normalize.identity import map_fn_source  # which needs the names above

    try:
        now = map_fn_source(name)
    except RecipeError:  # it has no source: nothing can be edited
        return
    if _LOADED.setdefault(name, now) != now:
        raise RecipeError(f"map_fn {name!r}: edited since this process imported it; start the process anew")


def refuse_collision(module: str, name: str) -> None:
    """RecipeError that names both files, where a module that a map_fn needs is the user's and ours."""
    collision = find_collision(module)
    if collision is None:
        return
    where, _, function = name.rpartition(":")
    theirs = collision.theirs
    written = theirs.relative_to(Path.cwd()) if theirs.is_relative_to(Path.cwd()) else theirs
    way_out = f", or write {written}:{function}" if where == module else ""
    raise RecipeError(f"map_fn {name!r}: {collision}{way_out}")
