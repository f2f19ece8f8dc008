"""The source of one function, where it stands in its file, and what a rule asks of it."""

from __future__ import annotations

import ast
import inspect
import linecache
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from types import FunctionType

Node = ast.FunctionDef


class NoSource(Exception):
    """Why the source of a function cannot be had."""


@dataclass
class Function:
    """A live function and its syntax tree.

    Attributes:
        value: the function.
        node: its tree, with the lines and columns of the file.
        lines: the lines of the file.
        class_name: the class that it is defined in, by which private names are mangled, or "".
        imported: the names that its file imports.
    """

    value: FunctionType
    node: Node
    lines: list[str]
    class_name: str
    imported: frozenset[str] = frozenset()

    @property
    def first_line(self) -> int:
        """The line of its first decorator, or of its ``def``."""
        return min([self.node.lineno, *(one.lineno for one in self.node.decorator_list)])

    def text(self, node: ast.expr | ast.stmt) -> str:
        """The source of a part, as it is written."""
        if node.end_lineno is None or node.end_col_offset is None:
            return ast.unparse(node)
        last = node.end_lineno, node.end_col_offset
        return self.between((node.lineno, node.col_offset), last)

    def between(self, first: tuple[int, int], last: tuple[int, int]) -> str:
        """The source from one (line, column in bytes) to another."""
        lines = [line.encode() for line in self.lines[first[0] - 1 : last[0]]]
        lines[-1] = lines[-1][: last[1]]
        lines[0] = lines[0][first[1] :]
        return b"".join(lines).decode()

    @cached_property
    def names(self) -> set[str]:
        """Every name that its code uses, for others to differ from."""
        used = {node.id for node in self.everything if isinstance(node, ast.Name)}
        return used | self._bindings.keys()

    @cached_property
    def everything(self) -> list[ast.AST]:
        """Every node of its tree: itself, its decorators and what lies inside of other nodes."""
        return list(ast.walk(self.node))

    @cached_property
    def _bindings(self) -> dict[str, list[ast.AST]]:
        """A name -> the nodes that give it a value or take it away."""
        found: dict[str, list[ast.AST]] = {}
        for node in self.everything[1:]:
            for name in _bound(node):
                found.setdefault(name, []).append(node)
        return found

    @cached_property
    def nodes(self) -> list[ast.AST]:
        """Every node of its body whose place is known: before Python 3.12 not those of f-strings.

        Not those of its decorators, defaults and annotations, which run elsewhere.
        """
        found: list[ast.AST] = []
        todo: list[ast.AST] = list(self.node.body)
        while todo:
            node = todo.pop()
            found.append(node)
            if not isinstance(node, ast.JoinedStr):
                todo += ast.iter_child_nodes(node)
        return found

    @cached_property
    def unfit(self) -> tuple[ast.AST, str] | None:
        """(where, why) no rule may touch it, since names more or values later would be seen."""
        given = [*self.node.args.posonlyargs, *self.node.args.args]
        if not given or given[0].arg != "self":
            return self.node, "it is no method"
        if len(bindings := self.stores("self")) > 1:
            return bindings[-1], "self is given another value"
        for node in self.everything:
            if isinstance(node, (ast.Yield, ast.YieldFrom)):
                return node, "it is a generator"
            if _looks_at_names(node):
                return node, f"{ast.unparse(node)} sees its local names"
        return None

    @cached_property
    def blocks(self) -> list[list[ast.stmt]]:
        """Every list of statements in it, but for those of functions and classes inside of it."""
        return list(_blocks(self.node))

    @property
    def statements(self) -> Iterator[ast.stmt]:
        """Every statement in it, in the order of the file."""
        return (statement for block in self.blocks for statement in block)

    def captured(self, name: str) -> ast.AST | None:
        """A function, class or generator inside of it that may use a local name at any time."""
        for scope in self.everything:
            if scope is not self.node and isinstance(scope, _SCOPES):
                for node in ast.walk(scope):
                    if isinstance(node, ast.Name) and node.id == name:
                        return node
        return None

    def shared(self, name: str) -> ast.AST | None:
        """Where a name is said to be no local one, or used by a function inside, or None."""
        for node in self.everything:
            if isinstance(node, (ast.Global, ast.Nonlocal)) and name in node.names:
                return node
        return self.captured(name)

    def stores(self, name: str) -> list[ast.AST]:
        """Every place that gives a local name a value, or takes it away."""
        return self._bindings.get(name, [])

    def loads(self, name: str) -> list[ast.Name]:
        """Every place in its body that reads a name."""
        names = [n for n in self.nodes if isinstance(n, ast.Name) and n.id == name]
        return [n for n in names if isinstance(n.ctx, ast.Load)]


_SCOPES = ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda, ast.GeneratorExp


def _bound(node: ast.AST) -> list[str]:
    """The names that a node itself gives a value, takes away, or says to be another scope's."""
    match node:
        case ast.Name(id=name, ctx=ast.Store() | ast.Del()) | ast.arg(arg=name):
            return [name]
        case ast.Global(names=names) | ast.Nonlocal(names=names):
            return names
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return [name]
        case (
            ast.ExceptHandler(name=str(name))
            | ast.MatchAs(name=str(name))
            | ast.MatchStar(name=str(name))
            | ast.MatchMapping(rest=str(name))
        ):
            return [name]
        case ast.alias(name=name, asname=other):
            return [other or name.split(".")[0]]
    return []


def changes(node: ast.AST) -> bool:
    """Whether a node itself changes a value in place, as far as it shows."""
    match node:
        case ast.AugAssign():
            return True
        case (
            ast.Attribute(ctx=ast.Store() | ast.Del()) | ast.Subscript(ctx=ast.Store() | ast.Del())
        ):
            return True
        case ast.Call(func=ast.Attribute(attr=name)) if name.endswith("_"):
            return not name.endswith("__")
        case ast.keyword(arg="out"):
            return True
        case ast.keyword(arg="inplace", value=value):
            return not (isinstance(value, ast.Constant) and value.value is False)
    return False


def _looks_at_names(node: ast.AST) -> bool:
    """Whether a node is a call that sees a function's local names, or runs text among them."""
    match node:
        case ast.Call(func=ast.Name(id="locals" | "exec" | "eval")):
            return True
        case ast.Call(func=ast.Name(id="vars" | "dir"), args=[], keywords=[]):
            return True
        case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)) if name in (
            "_getframe",
            "currentframe",
        ):
            return True
    return False


def _blocks(node: ast.AST) -> Iterator[list[ast.stmt]]:
    for field in ("body", "orelse", "finalbody"):
        block = getattr(node, field, None)
        if isinstance(block, list) and block and isinstance(block[0], ast.stmt):
            yield block
            for statement in block:
                if not isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                    yield from _blocks(statement)
    for handler in [*getattr(node, "handlers", ()), *getattr(node, "cases", ())]:
        yield from _blocks(handler)


Key = tuple[int, str]  #: A function's first line, that of its first decorator, and its name.


@dataclass
class _File:
    """Where the functions of a file stand: key -> (last line, the class around it)."""

    lines: list[str]
    functions: dict[Key, tuple[int, str]]
    imported: frozenset[str]


# Several rules look at one function after another, and discovery at one after another of a file.
# Trees are kept of the last files alone: they are by far the most objects that we make, and each
# collection of garbage would walk through all of them.
_last: list[Function] = []
_files: dict[str, _File] = {}
_trees: dict[str, dict[Key, Node]] = {}
_KEPT = 4


def function_of(value: FunctionType) -> Function:
    """The function with its source; raises NoSource with the reason where it cannot be had."""
    code, scope = value.__code__, value.__globals__
    if code.co_flags & (inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR):
        raise NoSource(f"{code.co_qualname} is asynchronous")
    lines = linecache.getlines(code.co_filename, scope)
    if not lines:
        raise NoSource(f"the source of {scope.get('__name__')} cannot be read")
    if _last and _last[0].value is value and _last[0].lines is lines:
        return _last[0]
    file = _files.get(code.co_filename)
    if file is None or file.lines is not lines:
        try:
            file = _parsed(code.co_filename, lines)
        except (SyntaxError, ValueError) as error:
            raise NoSource(f"the source of {scope.get('__name__')} is no Python: {error}") from None
    key = code.co_firstlineno, code.co_name
    if key not in file.functions:
        raise NoSource(f"{code.co_qualname} is not where its code says, in {code.co_filename}")
    last_line, class_name = file.functions[key]
    tree = _trees.get(code.co_filename, {}).get(key) or _alone(lines, key, last_line)
    _last[:] = [Function(value, tree, lines, class_name, file.imported)]
    return _last[0]


def _alone(lines: list[str], key: Key, last_line: int) -> Node:
    """The tree of one function of a file that was parsed before, at the same lines and columns."""
    first_line, name = key
    before = "\n" * (first_line - 1)
    if lines[first_line - 1][:1].isspace():
        before = before[1:] + "if True:\n"
    tree = ast.parse(before + "".join(lines[first_line - 1 : last_line]))
    return next(one for one in ast.walk(tree) if isinstance(one, Node) and one.name == name)


def _parsed(filename: str, lines: list[str]) -> _File:
    functions: dict[Key, tuple[int, str]] = {}
    trees: dict[Key, Node] = {}
    imported: set[str] = set()
    todo: list[tuple[ast.AST, str, bool]] = [(ast.parse("".join(lines)), "", True)]
    while todo:
        node, class_name, outside = todo.pop()
        if isinstance(node, ast.FunctionDef):
            key = min([node.lineno, *(one.lineno for one in node.decorator_list)]), node.name
            functions[key], trees[key] = (node.end_lineno or node.lineno, class_name), node
            outside = False
        elif isinstance(node, ast.ClassDef):
            class_name, outside = node.name, False
        elif isinstance(node, (ast.Import, ast.ImportFrom)) and outside:
            imported |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
        inside = [c for c in ast.iter_child_nodes(node) if isinstance(c, ast.stmt)]
        for handler in [*getattr(node, "handlers", ()), *getattr(node, "cases", ())]:
            inside += handler.body
        todo += [(one, class_name, outside) for one in inside]
    _trees.pop(filename, None)
    _trees[filename] = trees
    for older in list(_trees)[:-_KEPT]:
        _trees.pop(older, None)
    _files[filename] = _File(lines, functions, frozenset(imported - {"*"}))
    return _files[filename]
