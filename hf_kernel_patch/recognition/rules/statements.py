"""What rules ask of one statement: the name it gives a value, and what runs first in it."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from typing import TypeGuard

from hf_kernel_patch.recognition.function import Function


def assigned(statement: ast.stmt) -> tuple[str, ast.expr | None]:
    """(name, value) of an assignment to one name, else ("", None)."""
    target = target_of(statement)
    if target is None or not isinstance(statement, (ast.Assign, ast.AnnAssign)):
        return "", None
    return target.id, statement.value


def target_of(statement: ast.stmt) -> ast.Name | None:
    """The name that an assignment gives a value, if it is one name."""
    match statement:
        case ast.Assign(targets=[ast.Name() as target]):
            return target
        case ast.AnnAssign(target=ast.Name() as target, value=ast.expr(), simple=1):
            return target
    return None


def is_norm(node: ast.AST) -> TypeGuard[ast.Attribute]:
    """Whether an expression is an attribute of ``self`` that is named as a norm is."""
    return (
        isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
        and "norm" in node.attr.lower()
    )


def first_run(node: ast.AST) -> ast.AST | None:
    """The first part of a statement that runs and does more than read names and attributes.

    None where there is none. A part that is no call stands for code whose order is not known here.
    """
    match node:
        case ast.Name() | ast.Constant():
            return None
        case ast.Assign() | ast.AnnAssign() | ast.Return() | ast.Expr():
            return first_run(node.value) if node.value is not None else None
        case ast.AugAssign(target=ast.Name()):  # the name is read first, and changed last
            return first_run(node.value)
        case ast.Attribute(value=value):
            return first_run(value)
        case ast.Tuple(elts=parts) | ast.List(elts=parts):
            return _first(parts)
        case ast.Call(func=called, args=parts, keywords=named):
            return _first([called, *parts, *(keyword.value for keyword in named)]) or node
        case ast.BinOp(left=left, right=right):
            return _first([left, right]) or node
        case ast.UnaryOp(operand=part) | ast.Starred(value=part):
            return first_run(part) or node
        case ast.Subscript(value=value, slice=index):
            return _first([value, index]) or node
    return node


def _first(parts: Iterable[ast.AST]) -> ast.AST | None:
    return next((found for part in parts if (found := first_run(part)) is not None), None)


_VALUES = ast.Name, ast.Constant, ast.Attribute, ast.BoolOp, ast.UnaryOp, ast.Compare
#: Nodes of the tree that are parts of those values, and no values themselves.
_MARKS = ast.expr_context, ast.boolop, ast.Not, ast.cmpop
_QUIET = (*_VALUES, *_MARKS)


def is_quiet(condition: ast.expr) -> bool:
    """Whether a condition only compares names, attributes and constants.

    It may then be evaluated earlier, as long as none of its names gets another value in between.
    """
    return all(isinstance(node, _QUIET) for node in ast.walk(condition))


def on_one_line(function: Function, node: ast.expr) -> str:
    """The source of an expression, for a text that has no lines to spare."""
    text = function.text(node)
    return ast.unparse(node) if "\n" in text or "#" in text else text


def free_local(function: Function, name: str, taken: Iterable[str] = ()) -> str:
    """The name, or one like it, that the function does not use and that is not taken."""
    while name in function.names or name in taken:
        name += "_"
    return name
