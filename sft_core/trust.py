"""Whose word counts: which code a recipe may name, and what a run may read that somebody asked a server for.

In: names of modules, files and URLs; the environment of this process, which is set by whoever runs it. Out: nothing, or
a RecipeError. docs/security.md says who is trusted with what. Four variables decide:

SFT_PROJECT_DIR        the project's folder; the current one too
SFT_TRUSTED_MODULES    modules and folders, with commas, whose code a recipe may name besides
SFT_ALLOWED_PATHS      folders and beginnings of URLs, with commas, that a run asked for from a server may name besides
SFT_ALLOW_REMOTE_CODE  1: code from elsewhere may run: what comes with a model, what a recipe from a URL names
"""

import os
import re
import sys
import sysconfig
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path
from urllib.parse import unquote

from sft_core.errors import RecipeError
from sft_core.own_packages import module_file, search_folders

PROJECT, MODULES, PATHS = "SFT_PROJECT_DIR", "SFT_TRUSTED_MODULES", "SFT_ALLOWED_PATHS"
REMOTE_CODE = "SFT_ALLOW_REMOTE_CODE"
OWN_MODULES = ("sft_core.normalize.map_fns",)
"""Of ours, what is made to be named."""
INSTALLED = frozenset({"site-packages", "dist-packages"})
WRITTEN_BY_RUNS = frozenset({"mlartifacts", "mlruns"})
"""Folders of the project into which a server writes what clients send."""
STAGING = ".staging"
"""A store on a disk has this folder."""
SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")


def project_folders() -> list[Path]:
    """The project's folder and the current one, without links; never the root of the disk."""
    named = [Path(os.environ[PROJECT])] if os.environ.get(PROJECT) else []
    found = dict.fromkeys(folder.resolve() for folder in (*named, Path.cwd()))
    return [folder for folder in found if folder != folder.parent]


def trust_folder(folder: Path) -> None:
    """From now on a recipe may name code in `folder`, here and in processes that this one starts."""
    real = folder.resolve()
    if real != real.parent and not any(_below(real, known) for known in project_folders()):
        os.environ[MODULES] = ",".join(dict.fromkeys([*_entries(MODULES), str(real)]))


def require_code_file(path: Path, what: str) -> None:
    """RecipeError that begins with `what`, unless the file is code of the project or of a trusted folder."""
    if not _is_trusted_file(path):
        raise RecipeError(f"{what}: {path} is not of this project; {_way_out()}")


def require_module(dotted: str, what: str) -> None:
    """The same for a module, before it is imported; one that is nowhere is left to whoever imports it."""
    if _is_listed(dotted):
        return
    if dotted.partition(".")[0] in sys.stdlib_module_names:
        raise RecipeError(f"{what}: {dotted} is part of Python; {_way_out()}")
    file = _file_of(dotted)
    if file is not None and not _is_trusted_file(file):
        raise RecipeError(f"{what}: {dotted} is installed and not of this project; {_way_out()}")


def require_own(function: object, module: str, what: str) -> None:
    """The same for a function that a trusted module holds: one that it imported counts as where it comes from."""
    plain = _unwrapped(function)
    home, name = getattr(plain, "__module__", None), getattr(plain, "__qualname__", "<locals>")
    if home in (None, module) or "<locals>" in name:  # made by a call in the module: its writer meant it
        return
    code = getattr(plain, "__code__", None) or getattr(getattr(plain, "__init__", None), "__code__", None)
    file = Path(code.co_filename) if code is not None else None
    if file is None or not file.is_file() or not _is_trusted_file(file):
        require_module(str(home), what)


def allows_remote_code() -> bool:
    """Whether this process may run code that comes from elsewhere."""
    return os.environ.get(REMOTE_CODE, "").strip().lower() in ("1", "true", "yes")


def require_remote_code(what: str) -> None:
    """RecipeError that begins with `what`, unless code from elsewhere may run."""
    if not allows_remote_code():
        raise RecipeError(
            f"{what}, and that runs code from elsewhere with the rights of this process. Whoever runs it may allow it: "
            f"{REMOTE_CODE}=1 in its environment (of workers: of each)"
        )


def may_read(name: str, *, hidden: bool = False) -> bool:
    """Whether a run that was asked for from a server may name this file, folder or URL.

    A file lies, links followed, in the project's folder or in one of SFT_ALLOWED_PATHS; `hidden`: also below a name
    that begins with a dot. A folder is allowed if no link in it leads out. A URL begins as SFT_ALLOWED_PATHS says.
    """
    if SCHEME.match(name) or "::" in name:
        return _is_allowed_url(name)
    path = Path(name).expanduser()
    folders = [*project_folders(), *(Path(e).resolve() for e in _entries(PATHS) if not SCHEME.match(e))]
    try:
        return all(any(_below(one.resolve(), folder, hidden) for folder in folders) for one in _and_links(path))
    except (OSError, RuntimeError, ValueError):  # a circle of links, a name that no file has
        return False


def _and_links(path: Path) -> Iterator[Path]:
    """The path, and all links below it."""
    yield path
    for folder, folders, files in os.walk(path):
        yield from (found for name in (*folders, *files) if (found := Path(folder, name)).is_symlink())


def _is_allowed_url(url: str) -> bool:
    plain = unquote(unquote(url))
    if "::" in plain or "\\" in plain or ".." in re.split("[/?#]", plain):
        return False
    return any(_whole_names(url).startswith(_whole_names(entry)) for entry in _entries(PATHS) if SCHEME.match(entry))


def _whole_names(url: str) -> str:
    """Scheme and host in lower case, and one `/` at the end: `s3://a/b` is no beginning of `s3://a/bc`."""
    scheme, mark, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme.lower()}{mark}{host.lower()}{slash}{path}".rstrip("/") + "/"


def _is_trusted_file(path: Path) -> bool:
    real = path.resolve()
    listed = [Path(entry).resolve() for entry in _entries(MODULES) if "/" in entry]
    if any(_below(real, folder) for folder in listed):
        return True
    roots = [folder for folder in project_folders() if _below(real, folder)]
    python = {Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib")}
    elsewhere = INSTALLED & set(real.parts) or python & set(real.parents)
    return not elsewhere and any(not _is_written_by_runs(real, root) for root in roots)


def _is_written_by_runs(real: Path, root: Path) -> bool:
    """Whether the file lies in a store or among MLflow's artifacts: what is there came with rows and models."""
    between = [folder for folder in real.parents if folder != root and root in folder.parents]
    return any(folder.name in WRITTEN_BY_RUNS or (folder / STAGING).is_dir() for folder in between)


def _below(real: Path, folder: Path, hidden: bool = False) -> bool:
    if real != folder and folder not in real.parents:
        return False
    return hidden or not any(part.startswith(".") for part in real.relative_to(folder).parts)


def _is_listed(dotted: str) -> bool:
    names = (*OWN_MODULES, *(entry for entry in _entries(MODULES) if "/" not in entry))
    return any(dotted == name or dotted.startswith(f"{name}.") for name in names)


def _file_of(dotted: str) -> Path | None:
    """The file that importing the module would run, or has run; of one without source, what holds its top."""
    loaded = getattr(sys.modules.get(dotted), "__file__", None)
    if loaded:
        return Path(loaded)
    found = next((file for folder in search_folders() if (file := module_file(folder, dotted))), None)
    if found is not None:
        return found
    spec = PathFinder.find_spec(dotted.partition(".")[0])
    return Path(spec.origin) if spec is not None and spec.origin and spec.has_location else None


def _unwrapped(function: object) -> object:
    """Below its decorators."""
    for _ in range(100):
        if not hasattr(function, "__wrapped__"):
            break
        function = function.__wrapped__
    return function


def _entries(variable: str) -> list[str]:
    return [entry.strip() for entry in os.environ.get(variable, "").split(",") if entry.strip()]


def _way_out() -> str:
    here = " and ".join(map(str, project_folders())) or "the project's folder"
    return (
        f"code is taken from {here}, the recipe's folder, and what {MODULES} names (modules, folders). Write a "
        "function of your own there, or set that variable"
    )
