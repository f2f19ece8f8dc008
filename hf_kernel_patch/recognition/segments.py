"""Cutting a function into functions: its statements up to one, from there to another, and the rest.

Each segment is a function of the names that it reads and gives those that are read after it. It
runs the very statements that stood there, with the original's globals, free variables and lines.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import FunctionType
from typing import Any

from hf_kernel_patch.recognition.function import Function
from hf_kernel_patch.recognition.rewriting import agrees, compiled_tree

Statements = Sequence[ast.stmt]


class CannotCut(Exception):
    """Why a function cannot be cut."""


@dataclass(frozen=True)
class Segment:
    """Some statements of a function.

    Attributes:
        run: values of ``ins`` -> values of ``outs``; the function's result for one that returns.
        ins: local names that have their values from before.
        outs: local names that get a value here that is read later.
    """

    run: Any
    ins: tuple[str, ...]
    outs: tuple[str, ...]


def same(*values: object) -> tuple[Any, ...]:
    """What a segment runs that only gives values other names."""
    return values


def body_of(function: Function) -> list[ast.stmt]:
    """A function's statements without its docstring."""
    first, *rest = function.node.body
    string = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    return rest if string else [first, *rest]


def parameters_of(function: Function) -> tuple[str, ...]:
    """The names of a function's parameters, as its code has them: stars last."""
    given = function.node.args
    stars = [one for one in (given.vararg, given.kwarg) if one is not None]
    every = [*given.posonlyargs, *given.args, *given.kwonlyargs, *stars]
    return tuple(one.arg for one in every)


def cut(
    function: Function, body: Statements, points: Sequence[int], live: Iterable[str] = ()
) -> list[Segment]:
    """The segments of ``body``, statements of a function, that end before each of the points.

    One more goes from the last point to the end; ``live`` are names that are read after it.
    Raises CannotCut with the reason where the segments would not do what the function does.
    """
    for reason in _reasons(function, body[: points[-1] if points else 0]):
        raise CannotCut(reason)
    places = [0, *points, len(body)]
    parts = [body[first:last] for first, last in pairwise(places)]
    local = {*parameters_of(function), *(n for s in body for n, _ in _names(s, stores=True))}
    after, found = set(live), []
    bound = [set(parameters_of(function))]
    for part in parts:
        bound.append(bound[-1] | _bound(part))
    for part, known in reversed(list(zip(parts, bound))):
        outs = after & {name for s in part for name, _ in _names(s, stores=True)}
        ins = _live(part, outs) & local
        if missing := sorted(ins - known):
            raise CannotCut(f"{missing[0]} may have no value where it is cut")
        found.append(_segment(function, part, sorted(ins), sorted(outs)))
        after = (after - outs) | ins
    return found[::-1]


def made(function: Function, node: ast.FunctionDef, free: Iterable[str] = ()) -> FunctionType:
    """A function from a tree, in the place of another: its scope, its free variables, its class."""
    original = function.value
    closure = dict(zip(original.__code__.co_freevars, original.__closure__ or ()))
    code = compiled_tree(function, node, closure, original.__code__.co_filename)
    cells = tuple(closure[name] for name in code.co_freevars)
    return FunctionType(code, original.__globals__, node.name, None, cells)


def definition(
    name: str, arguments: ast.arguments | Iterable[str], body: Statements, place: ast.AST
) -> ast.FunctionDef:
    """The tree of a function of these parameters, which stands where ``place`` does."""
    if not isinstance(arguments, ast.arguments):
        names = [ast.arg(one) for one in arguments]
        arguments = ast.arguments([], names, None, [], [], None, [])
    return ast.copy_location(ast.FunctionDef(name, arguments, list(body), []), place)


def returned(names: Iterable[str], place: ast.AST) -> ast.Return:
    """``return (names...)``."""
    elements: list[ast.expr] = [ast.Name(name, ast.Load()) for name in names]
    statement = ast.Return(ast.Tuple(elements, ast.Load()))
    for node in ast.walk(statement):
        ast.copy_location(node, place)
    return statement


def _segment(function: Function, part: Statements, ins: list[str], outs: list[str]) -> Segment:
    place = part[-1] if part else function.node
    end = [] if part and isinstance(part[-1], ast.Return) else [returned(outs, place)]
    node = definition(function.node.name, ins, [*part, *end], part[0] if part else place)
    return Segment(made(function, node), tuple(ins), tuple(outs))


# -- what hinders


_INNER = ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda, ast.GeneratorExp
_SPECIAL = (
    *(ast.Yield, ast.YieldFrom, ast.Await),
    *(ast.Global, ast.Nonlocal, ast.Delete, ast.Match, ast.TryStar),
)
#: What looks at the frame that it is called from.
_FRAME = {"super", "locals", "vars", "dir", "eval", "exec"}


def _reasons(function: Function, before: Statements) -> Iterator[str]:
    if not agrees(function):
        yield "its code is not that of its source"
    for node in (n for s in function.node.body for n in ast.walk(s)):
        if isinstance(node, _INNER):
            yield f"line {node.lineno}: a function inside of it may use its names at any time"
        elif isinstance(node, _SPECIAL):
            yield f"line {getattr(node, 'lineno', 0)}: {type(node).__name__.lower()}"
        elif isinstance(node, ast.Name) and node.id in _FRAME:
            yield f"line {node.lineno}: {node.id}() looks at all of its names"
    for node in (n for s in before for n in ast.walk(s)):
        if isinstance(node, ast.Return):
            yield f"line {node.lineno}: it may return before it is cut"


# -- which names live


def _names(node: ast.AST, stores: bool) -> Iterator[tuple[str, ast.AST]]:
    """The names that a part stores or reads; those of comprehensions are their own."""
    if isinstance(node, (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
        own = {n for g in node.generators for n, _ in _names(g.target, stores=True)}
        for child in ast.iter_child_nodes(node):
            yield from ((n, at) for n, at in _names(child, stores) if n not in own)
        # What is gone through is read outside of it, where these names are others.
        yield from _names(node.generators[0].iter, stores)
        return
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) is not stores:
        yield node.id, node
    elif isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name) and not stores:
        yield node.target.id, node
    elif isinstance(node, ast.alias) and stores:
        yield node.asname or node.name.split(".")[0], node
    elif isinstance(node, ast.ExceptHandler) and node.name and stores:
        yield node.name, node
    for child in ast.iter_child_nodes(node):
        yield from _names(child, stores)


def reads(*nodes: ast.AST) -> set[str]:
    """Every name that these parts read."""
    return {name for node in nodes for name, _ in _names(node, stores=False)}


def stores(*nodes: ast.AST) -> set[str]:
    """Every name that these parts may give a value."""
    return {name for node in nodes for name, _ in _names(node, stores=True)}


def _certain(statement: ast.stmt) -> set[str]:
    """The names that a statement without a body gives a value whenever it runs."""
    if isinstance(statement, ast.Assign):
        return stores(*statement.targets)
    if isinstance(statement, ast.AnnAssign):
        return stores(statement.target) if statement.value is not None else set()
    if isinstance(statement, (ast.AugAssign, ast.Import, ast.ImportFrom)):
        return stores(statement)
    return set()


def _bound(statements: Statements) -> set[str]:
    """The names that have a value after these statements, whatever way they went."""
    found: set[str] = set()
    for statement in statements:
        if isinstance(statement, ast.If):
            branches = [statement.body, statement.orelse]
            ends = [b for b in branches if not (b and isinstance(b[-1], (ast.Raise, ast.Return)))]
            bound = [_bound(branch) for branch in ends]
            found |= set.intersection(*bound) if bound else set()
        elif isinstance(statement, ast.With):
            found |= _bound(statement.body)
        else:
            found |= _certain(statement)
    return found


def _live(statements: Statements, after: set[str]) -> set[str]:
    """The names that these statements, or what reads ``after``, may read from before them."""
    for statement in reversed(statements):
        after = _live_before(statement, after)
    return after


def _live_before(statement: ast.stmt, after: set[str]) -> set[str]:
    if isinstance(statement, ast.If):
        either = _live(statement.body, after) | _live(statement.orelse, after)
        return reads(statement.test) | either
    if isinstance(statement, (ast.For, ast.While)):
        head = statement.iter if isinstance(statement, ast.For) else statement.test
        own = stores(statement.target) if isinstance(statement, ast.For) else set()
        after = after | _live(statement.orelse, after) | reads(head)
        # Once around for what a pass reads, once more for what the next one does.
        after = after | (_live(statement.body, after) - own)
        return after | (_live(statement.body, after) - own)
    if isinstance(statement, ast.With):  # which may go on after any part of it, as suppress does
        heads = [item.context_expr for item in statement.items]
        return after | reads(*heads) | _live(statement.body, after)
    if isinstance(statement, ast.Try):
        return after | reads(statement)
    return (after - _certain(statement)) | reads(statement)
