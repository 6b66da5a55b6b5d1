"""Values of a Python config, read with `ast` and never run.

In: the text of a config in mmengine's style: literals, names, arithmetic, `dict(...)`, `if` on known values. Out: its
top-level names with their values, and the statements that were not followed. A name that the config imports stays a
`Symbol`; an expression that only Python could answer stays `Unread`.
"""

import ast
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}
LARGEST_EXPONENT = 64
LONGEST = 100_000
"""Characters or items of what `+` may make: a config cannot fill the memory."""


@dataclass(frozen=True, slots=True)
class Symbol:
    """A name from elsewhere, such as `xtuner.utils` + `PROMPT_TEMPLATE`; `module` is "" for the config's own."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}".lstrip(".")


@dataclass(frozen=True, slots=True)
class Unread:
    """An expression whose value only running it would tell."""

    source: str

    def __str__(self) -> str:
        return self.source


@dataclass(frozen=True, slots=True)
class Skipped:
    """A statement that was not followed."""

    line: int
    source: str


@dataclass(slots=True)
class Reading:
    """Top-level names so far, and what was skipped."""

    values: dict[str, Any] = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)

    def run(self, statements: list[ast.stmt]) -> None:
        """Take in statements in order."""
        for statement in statements:
            if not self._assign(statement) and not self._bind(statement) and not _is_text(statement):
                self.skipped.append(Skipped(statement.lineno, ast.unparse(statement).split("\n")[0]))

    def _assign(self, statement: ast.stmt) -> bool:
        match statement:
            case ast.Assign(targets=targets, value=expression):
                value = self.value(expression)
                stored = [self._store(target, value) for target in targets]
                return all(stored)
            case ast.AnnAssign(target=target, value=ast.expr() as expression):
                return self._store(target, self.value(expression))
            case ast.AugAssign(target=target, op=op, value=expression):
                old = self.value(target)
                return self._store(target, _arithmetic(op, old, self.value(expression), ast.unparse(statement)))
        return False

    def _store(self, target: ast.expr, value: Any) -> bool:
        """Assign to a name, or to a key of a section (`model["lora"]`, `model.lora`)."""
        match target:
            case ast.Name(id=name):
                self.values[name] = value
                return True
            case ast.Attribute(value=inner, attr=key) | ast.Subscript(value=inner, slice=ast.Constant(value=key)):
                section = self.value(inner)
                if isinstance(section, dict) and isinstance(key, str):
                    section[key] = value
                    return True
        return False

    def _bind(self, statement: ast.stmt) -> bool:
        match statement:
            case ast.Import(names=names):
                for alias in names:
                    name = alias.name if alias.asname else alias.name.partition(".")[0]
                    self.values[alias.asname or name] = Symbol("", name)
                return True
            case ast.ImportFrom(names=names, module=module, level=level):
                where = "." * level + (module or "")
                self.values |= {alias.asname or alias.name: Symbol(where, alias.name) for alias in names}
                return names[0].name != "*"
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                self.values[name] = Symbol("", name)
                return False
            case ast.With(items=[ast.withitem(context_expr=ast.Call(func=ast.Name(id="read_base")))], body=body):
                self.run(body)
                return all(isinstance(inner, ast.ImportFrom) and inner.names[0].name != "*" for inner in body)
            case ast.If(test=test, body=body, orelse=orelse):
                known = self.value(test)
                if not isinstance(known, Unread | Symbol):
                    self.run(body if known else orelse)
                    return True
        return False

    def value(self, node: ast.expr) -> Any:
        """The value of an expression, `Symbol` or `Unread`."""
        match node:
            case ast.Constant(value=value):
                return value
            case ast.Name(id=name):
                return self.values.get(name, Unread(name))
            case ast.List(elts=items) | ast.Tuple(elts=items):
                return [self.value(item) for item in items]
            case ast.Dict(keys=keys, values=values) if all(isinstance(key, ast.Constant) for key in keys):
                pairs = zip(keys, values, strict=True)
                return {key.value: self.value(value) for key, value in pairs if isinstance(key, ast.Constant)}
            case ast.BinOp(left=left, op=op, right=right):
                return _arithmetic(op, self.value(left), self.value(right), ast.unparse(node))
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return _arithmetic(ast.Sub(), 0, self.value(operand), ast.unparse(node))
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                known = self.value(operand)
                return Unread(ast.unparse(node)) if isinstance(known, Unread | Symbol) else not known
            case ast.Compare(left=left, ops=[op], comparators=[right]):
                return _compare(op, self.value(left), self.value(right), ast.unparse(node))
            case ast.IfExp(test=test, body=body, orelse=orelse):
                known = self.value(test)
                known_test = not isinstance(known, Unread | Symbol)
                return self.value(body if known else orelse) if known_test else Unread(ast.unparse(node))
            case ast.Attribute(value=inner, attr=key) | ast.Subscript(value=inner, slice=ast.Constant(value=key)):
                return _member(self.value(inner), key, ast.unparse(node))
            case ast.Call():
                return self._call(node)
        return Unread(ast.unparse(node))

    def _call(self, node: ast.Call) -> Any:
        positional = [self.value(argument) for argument in node.args]
        match node.func:
            case ast.Name(id="dict") if all(isinstance(argument, dict) for argument in positional):
                merged: dict[Any, Any] = {key: value for argument in positional for key, value in argument.items()}
                for keyword in node.keywords:
                    value = self.value(keyword.value)
                    if keyword.arg is None and not isinstance(value, dict):
                        return Unread(ast.unparse(node))
                    merged |= value if keyword.arg is None else {keyword.arg: value}
                return merged
            case ast.Name(id="int" | "float" as name) if len(positional) == 1 and _is_number(positional[0]):
                return int(positional[0]) if name == "int" else float(positional[0])
        return Unread(ast.unparse(node))


def _is_text(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Pass) or (
        isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _arithmetic(op: ast.operator, left: Any, right: Any, source: str) -> Any:
    """Numbers by any operator, texts and lists by `+`. What cannot be computed, or would be huge, is Unread."""
    joins = (
        isinstance(op, ast.Add)
        and type(left) is type(right)
        and isinstance(left, str | list)
        and len(left) + len(right) <= LONGEST
    )
    numbers = _is_number(left) and _is_number(right) and not (isinstance(op, ast.Pow) and right > LARGEST_EXPONENT)
    if type(op) not in ARITHMETIC or not (joins or numbers):
        return Unread(source)
    try:
        return ARITHMETIC[type(op)](left, right)
    except ArithmeticError:
        return Unread(source)


def _compare(op: ast.cmpop, left: Any, right: Any, source: str) -> Any:
    plain = not any(isinstance(side, Unread | Symbol) for side in (left, right))
    if not plain or type(op) not in COMPARISONS:
        return Unread(source)
    try:
        return COMPARISONS[type(op)](left, right)
    except TypeError:
        return Unread(source)


def _member(value: Any, key: Any, source: str) -> Any:
    if isinstance(value, Symbol) and isinstance(key, str):
        return Symbol(str(value), key)
    try:
        return value[key]
    except (KeyError, IndexError, TypeError):
        return Unread(source)
