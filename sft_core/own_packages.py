"""Our packages, and a user's of the same names.

`flows`, `tasks`, `cli`, `recipes` and `demo` are names that users have too, and a user's folder may come first on
`sys.path` (Prefect puts it there). In a process of ours these names are ours; what the user has under them is found
behind ours. Python itself does that: a package in `sys.modules` is not looked for again, and its modules are looked for
in the folders of its `__path__`. So `hold_names` imports ours by their place, before anything else can come first, and
puts the user's folders of these names behind ours.
"""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

NAMES = ("cli", "demo", "flows", "recipes", "tasks")
ROOT = Path(__file__).resolve().parents[1]
"""The folder that holds `sft_core` and the packages of NAMES: site-packages, or a checkout."""


@dataclass(frozen=True, slots=True)
class Collision:
    """Two files for one module. Ours is the one that Python loads."""

    dotted: str
    theirs: Path
    ours: Path

    def __str__(self) -> str:
        return (
            f"{self.dotted} is two files: {self.theirs} (yours) and {self.ours} (of sft-flows; it is the one that is "
            "loaded); rename yours"
        )


def hold_names() -> None:
    """From now on NAMES mean our packages in this process; the user's folders of these names come behind ours.

    The current folder goes to the end of `sys.path`, so that nothing in it hides an installed package.
    """
    for name in NAMES:
        loaded = sys.modules.get(name)
        if (ROOT / name / "__init__.py").is_file() and (loaded is None or not _is_ours(loaded)):
            _import_ours(name)
    _current_folder_last()
    _order(users_first=False)


def hold_free_names() -> None:
    """The same for a library's caller: a name of NAMES that the caller's own code has loaded stays the caller's."""
    for name in NAMES:
        if name not in sys.modules and (ROOT / name / "__init__.py").is_file():
            _import_ours(name)
    _order(users_first=False)


def let_users_first() -> None:
    """For a process that is not ours and has come upon one of our packages: it meant the user's folder of that name.

    Python takes an installed package before a folder without `__init__.py`, even one that comes first on the path.
    """
    _order(users_first=True)


@contextmanager
def also_found_in(folder: Path) -> Iterator[None]:
    """Inside the block, modules below `folder` are found in our packages, right behind our own."""
    added = [(ours, str(folder / name)) for name, ours in _ours_loaded() if (folder / name).is_dir() and folder != ROOT]
    for ours, theirs in added:
        ours.__path__.insert(1, theirs)
    try:
        yield
    finally:
        for ours, theirs in added:
            ours.__path__.remove(theirs)


def find_collision(dotted: str) -> Collision | None:
    """The two files of a module that we and the user have, if there are two."""
    if dotted.partition(".")[0] not in NAMES:
        return None
    ours = module_file(ROOT, dotted)
    for folder in search_folders():
        theirs = module_file(folder, dotted)
        if ours is not None and theirs is not None and theirs.resolve() != ours:
            return Collision(dotted, theirs, ours)
    return None


def module_file(root: Path, dotted: str) -> Path | None:
    """The source of a module below `root`."""
    base = root.joinpath(*dotted.split("."))
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)


def search_folders() -> list[Path]:
    """Where Python looks for modules, in its order, then the current folder."""
    return list(dict.fromkeys([*(Path(entry).resolve() for entry in sys.path), Path.cwd().resolve()]))


def _current_folder_last() -> None:
    here = Path.cwd().resolve()
    if here == ROOT:  # a checkout
        return
    mine = [entry for entry in sys.path if Path(entry).resolve() == here]  # "" is the current folder too
    sys.path[:] = [entry for entry in sys.path if entry not in mine] + mine  # as many: Prefect removes the one it added


def _order(users_first: bool) -> None:
    """Of our packages that are loaded, the folders in which their modules are looked for."""
    folders = [folder for folder in search_folders() if folder != ROOT]
    for name, ours in _ours_loaded():
        theirs = [str(folder / name) for folder in folders if (folder / name).is_dir()]
        own = [str(ROOT / name)]
        ours.__path__[:] = theirs + own if users_first else own + theirs


def _ours_loaded() -> Iterator[tuple[str, Any]]:
    for name in NAMES:
        loaded = sys.modules.get(name)
        if loaded is not None and _is_ours(loaded):
            yield name, loaded


def _is_ours(module: ModuleType) -> bool:
    file = getattr(module, "__file__", None)
    return file is not None and Path(file).resolve() == ROOT / module.__name__ / "__init__.py"


def _import_ours(name: str) -> None:
    """Import by place. What was loaded under the name before goes on living in those who have it."""
    file = ROOT / name / "__init__.py"
    spec = importlib.util.spec_from_file_location(name, file, submodule_search_locations=[str(file.parent)])
    assert spec is not None, f"{file} is Python source"
    assert spec.loader is not None, f"{file} is Python source"
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
