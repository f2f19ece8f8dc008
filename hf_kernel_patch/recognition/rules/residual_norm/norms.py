"""The call of a norm that follows a sum, and whether it may be computed together with the sum."""

from __future__ import annotations

import ast
from typing import Any

from hf_kernel_patch.recognition.edits import end, start
from hf_kernel_patch.recognition.function import Function, changes
from hf_kernel_patch.recognition.rules.statements import assigned, first_run, is_norm, is_quiet


def norm_of_sum(value: Any, names: set[str]) -> ast.Call | None:
    """The call itself, if it is ``self.norm(name)`` of one of the names of the sum."""
    if not isinstance(value, ast.Call) or not is_norm(value.func):
        return None
    given = [*value.args, *(keyword.value for keyword in value.keywords)]
    first = given[0] if given else None
    return value if isinstance(first, ast.Name) and first.id in names else None


def norm_run_first(statement: ast.stmt, names: set[str]) -> ast.Call | None:
    """The norm of the sum, if it is what a statement runs before all else.

    Between the sum and it there is then nothing but names and attributes that are read.
    """
    return norm_of_sum(first_run(statement), names)


def norm_under(statement: ast.If, names: set[str], before: list[ast.stmt]) -> ast.Call | None:
    """The norm of the sum, if it is what runs first where a condition holds, and there alone.

    The condition has to be one that can be asked for at the sum, the first of the statements
    ``before``; whether it holds is then kept, as the norm's result.
    """
    read = {node.id for node in ast.walk(statement.test) if isinstance(node, ast.Name)}
    if not is_quiet(statement.test) or read & _stored(before):
        return None
    for one in statement.body:
        if (call := norm_run_first(one, names)) is not None:
            return call
        to, given = assigned(one)
        if not to or not isinstance(given, ast.Name):
            return None
        names = names | {to} if given.id in names else names - {to}
    return None


def changed_later(
    function: Function, names: set[str], call: ast.Call, elsewhere: list[ast.stmt]
) -> str:
    """Why autograd would miss the sum's value after its norm, or "".

    ``elsewhere`` are statements that do not run where the norm does.
    """
    apart = {id(node) for one in elsewhere for node in ast.walk(one)}
    for node in function.nodes:
        name = _changed(node)
        if name not in names or id(node) in apart or end(node) <= start(call):
            continue
        if not any(end(call) <= start(one) < start(node) for one in function.stores(name)):
            return f"{name} is changed in place after its norm"
    return ""


def _changed(node: Any) -> str:
    """The local name whose value a node changes in place, or ""."""
    if not changes(node):
        return ""
    match node:
        case ast.AugAssign(target=part) | ast.keyword(value=part) | ast.Call(func=part):
            pass
        case _:
            part = node
    while isinstance(part, (ast.Attribute, ast.Subscript)):
        part = part.value
    return part.id if isinstance(part, ast.Name) else ""


def _stored(statements: list[ast.stmt]) -> set[str]:
    nodes = [node for one in statements for node in ast.walk(one) if isinstance(node, ast.Name)]
    return {node.id for node in nodes if not isinstance(node.ctx, ast.Load)}


def why_not_alone(function: Function, name: str, call: ast.Call) -> str:
    """Why a norm is not computed of the sum alone, or the sum is not this function's alone."""
    if not call.args:
        return "the norm takes the sum by keyword"
    if len(call.args) != 1 or call.keywords:
        return "the norm takes more than the sum"
    if function.shared(name) is not None:
        return f"{name} is no name of this function alone"
    return ""
