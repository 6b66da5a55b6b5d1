"""Who a map_fn is, for the fingerprint: its syntax tree and that of all it uses in its own project.

In: the name of a map_fn. Out: `{"name", "version"}` of a shipped one, or `{"function", "code"}` of a user's, where
`code` has the hash of each definition used, by `module:name` (`:name` in the function's own module). Nothing is run.
Comments, layout and docstrings do not count, nor do installed packages. What a function reads by other ways (a data
file, `globals()`) cannot be seen here.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sft_core.errors import RecipeError
from sft_core.fingerprint import hash_text
from sft_core.normalize.load import missing_file, nearest, refuse_collision, shipped_name, split_name
from sft_core.normalize.map_fns import MAP_FNS_VERSION
from sft_core.own_packages import module_file, search_folders
from sft_core.trust import require_code_file, require_module

Block = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def map_fn_source(name: str) -> dict[str, Any]:
    """The identity of a map_fn."""
    shipped = shipped_name(name)
    if shipped:
        return {"name": shipped, "version": MAP_FNS_VERSION}
    where, function = split_name(name)
    if where.endswith(".py"):
        path = Path(where).resolve()
        if not path.is_file():
            raise missing_file(Path(where), name)
        require_code_file(path, f"map_fn {name!r}")
        project = _Project(path.parent, own=path.stem, path=path)
    else:
        root = find_root(where, name)
        require_module(where, f"map_fn {name!r}")
        project = _Project(root, own=where, path=module_file(root, where), name=name)
    own = project.module(project.own)
    if function not in own.known() and not own.stars:
        known = list(own.definitions)
        raise RecipeError(f"map_fn {name!r}: {where} has no function {function!r}{nearest(function, known)}")
    project.follow(project.own, (function,))
    return {"function": function, "code": dict(sorted(project.code.items()))}


def find_root(dotted: str, name: str) -> Path:
    """The folder from which a module is imported: the first on `sys.path` that has it, else the current one."""
    refuse_collision(dotted, name)
    for folder in search_folders():
        if module_file(folder, dotted):
            return folder
    raise RecipeError(f"map_fn {name!r}: no Python source of {dotted!r} here or on sys.path")


@dataclass
class _Module:
    """The names that a module defines or imports at its top level."""

    definitions: dict[str, list[ast.stmt]] = field(default_factory=dict)
    imports: dict[str, str] = field(default_factory=dict)  # name here -> dotted name there
    stars: list[str] = field(default_factory=list)  # modules of `from module import *`

    def known(self) -> set[str]:
        return self.definitions.keys() | self.imports.keys()


class _Project:
    """Walks from one function to everything it uses among the modules below `root`."""

    def __init__(self, root: Path, own: str, path: Path | None, name: str | None = None) -> None:
        """`name` of a map_fn that is imported; one in a file finds its neighbours before anything else."""
        self.root, self.own, self.path, self.name = root, own, path, name
        installed = {"site-packages", "dist-packages"} & set(root.parts)
        self.top = own.partition(".")[0] if installed else None  # of an installed package, only its own modules
        self.code: dict[str, str] = {}
        self._modules: dict[str, _Module] = {}

    def module(self, dotted: str) -> _Module:
        """A module of the project, read once."""
        if dotted not in self._modules:
            if self.name is not None:
                refuse_collision(dotted, self.name)
            path = self.path if dotted == self.own else module_file(self.root, dotted)
            assert path is not None, f"{dotted} was found before"
            try:
                tree = ast.parse(path.read_bytes())
            except SyntaxError as error:
                raise RecipeError(f"{path}, line {error.lineno}: not Python: {error.msg}") from None
            package = dotted if path.name == "__init__.py" else dotted.rpartition(".")[0]
            self._modules[dotted] = _read_module(tree, package)
        return self._modules[dotted]

    def is_local(self, dotted: str) -> bool:
        """Whether a module is one of the project's."""
        return (self.top in (None, dotted.partition(".")[0])) and module_file(self.root, dotted) is not None

    def collect(self, dotted: str, name: str) -> None:
        """Add the hash of what `name` means in a module, and of all that it uses."""
        key = f"{'' if dotted == self.own else dotted}:{name}"
        module = self.module(dotted)
        if key in self.code:
            return
        nodes = module.definitions.get(name, [])
        imported = module.imports.get(name, "")  # another thing under the same name is a change
        self.code[key] = hash_text("\n".join([imported, *map(syntax, nodes)]))
        for node in nodes:
            for chain in chains(node):
                self.follow(dotted, chain)

    def follow(self, dotted: str, chain: tuple[str, ...]) -> None:
        """A name with its attributes, `a.b.c`, as it is used in a module."""
        module, name = self.module(dotted), chain[0]
        if name in module.known():
            self.collect(dotted, name)
            if name in module.imports:
                self._follow_import(module.imports[name].split("."), chain[1:])
        else:
            for star in filter(self.is_local, module.stars):
                if name in self.module(star).known():
                    self.follow(star, chain)

    def _follow_import(self, target: list[str], attributes: tuple[str, ...]) -> None:
        """Find the module in `target` plus `attributes` (the longest that is one) and the name used of it."""
        parts = [*target, *attributes]
        for end in range(len(parts), 0, -1):
            dotted = ".".join(parts[:end])
            if self.is_local(dotted):
                rest = tuple(parts[end:])
                if rest:
                    self.follow(dotted, rest)
                else:  # the module itself is handed on: all of it counts
                    for name in sorted(self.module(dotted).definitions):
                        self.collect(dotted, name)
                return


def _read_module(tree: ast.Module, package: str) -> _Module:
    module = _Module()
    for statement in tree.body:
        for node in ast.walk(statement):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    bound = alias.asname or alias.name.partition(".")[0]
                    module.imports[bound] = alias.name if alias.asname else bound
            elif isinstance(node, ast.ImportFrom):
                base = _base(node, package)
                module.stars += [base for alias in node.names if alias.name == "*"]
                module.imports |= {a.asname or a.name: f"{base}.{a.name}" for a in node.names if a.name != "*"}
        if isinstance(statement, Block):
            module.definitions.setdefault(statement.name, []).append(statement)
        elif not isinstance(statement, ast.Import | ast.ImportFrom) and not _is_main_block(statement):
            for name in sorted(_touched(statement)):
                module.definitions.setdefault(name, []).append(statement)
    return module


def _base(node: ast.ImportFrom, package: str) -> str:
    """The module that `from ... import` names, dots resolved."""
    if not node.level:
        return node.module or ""
    parts = package.split(".")[: len(package.split(".")) - node.level + 1]
    return ".".join([*parts, *([node.module] if node.module else [])])


def _is_main_block(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.If) and ("__name__",) in chains(statement.test)


def _touched(statement: ast.stmt) -> set[str]:
    """Names that a statement binds or may alter: what it assigns, or all in a bare call such as `TABLE.update(...)`."""
    names = {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}
    if isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        names = {node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)}
    return names | {node.name for node in ast.walk(statement) if isinstance(node, Block)}


def chains(node: ast.AST) -> Iterator[tuple[str, ...]]:
    """Every name used in a tree, with the attributes taken of it: `text.clean(x)` gives (text, clean) and (x,)."""
    attributes: list[str] = []
    inner = node
    while isinstance(inner, ast.Attribute):
        attributes.append(inner.attr)
        inner = inner.value
    if isinstance(inner, ast.Name):
        yield (inner.id, *reversed(attributes))
        return
    for child in ast.iter_child_nodes(inner):
        yield from chains(child)


def syntax(node: object) -> str:
    """A tree as text, equal on every Python version that parses it alike; docstrings are left out.

    >>> syntax(ast.parse("def f(x):\\n  'Doc.'\\n  return x  # why")) == syntax(ast.parse("def f(x): return x"))
    True
    """
    if isinstance(node, list):
        return f"[{','.join(map(syntax, node))}]"
    if not isinstance(node, ast.AST):
        return f"{type(node).__name__} {node!a}"
    fields = dict(ast.iter_fields(node))
    if isinstance(node, Block) and ast.get_docstring(node, clean=False) is not None:
        fields["body"] = node.body[1:]
    if isinstance(node, ast.JoinedStr):  # Python 3.12 puts empty texts into some f-strings
        fields["values"] = [part for part in node.values if not (isinstance(part, ast.Constant) and part.value == "")]
    kept = {key: value for key, value in fields.items() if value not in (None, []) and key not in ("ctx", "kind")}
    if isinstance(node, ast.Constant):
        kept["value"] = node.value
    return f"{type(node).__name__}({','.join(f'{key}={syntax(value)}' for key, value in kept.items())})"
