"""The call of a norm that follows a sum, and whether it may be computed together with the sum."""

from __future__ import annotations

import ast

from hf_kernel_patch.recognition.edits import end, start
from hf_kernel_patch.recognition.function import Function, changes
from hf_kernel_patch.recognition.rules.statements import assigned, first_run, is_norm, is_quiet


def norm_of_sum(value: ast.AST | None, names: set[str]) -> ast.Call | None:
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
    """The norm of the sum, if it runs first in the body of an ``if``.

    The condition has to be one that can be evaluated at the sum already, the first of the
    statements ``before``. Whether it holds is then seen by the norm's result, None or a tensor.
    """
    read = {node.id for node in ast.walk(statement.test) if isinstance(node, ast.Name)}
    if not is_quiet(statement.test) or read & _stored(before):
        return None
    for inner in statement.body:
        if (call := norm_run_first(inner, names)) is not None:
            return call
        to, given = assigned(inner)
        if not to or not isinstance(given, ast.Name):
            return None
        names = names | {to} if given.id in names else names - {to}
    return None


def changed_later(
    function: Function, names: set[str], call: ast.Call, elsewhere: list[ast.stmt]
) -> str:
    """Why the sum's value, which autograd keeps for the backward, changes after its norm, or "".

    ``elsewhere`` are statements that do not run where the norm does.
    """
    apart = {id(node) for statement in elsewhere for node in ast.walk(statement)}
    for node in function.nodes:
        name = _changed(node)
        if name not in names or id(node) in apart or end(node) <= start(call):
            continue
        if not any(end(call) <= start(n) < start(node) for n in function.stores(name)):
            return f"{name} is changed in place after its norm"
    return ""


def _changed(node: ast.AST) -> str:
    """The local name whose value a node changes in place, or ""."""
    if not changes(node):
        return ""
    part = node
    match node:
        case ast.AugAssign(target=target):
            part = target
        case ast.keyword(value=value):
            part = value
        case ast.Call(func=called):
            part = called
    while isinstance(part, (ast.Attribute, ast.Subscript)):
        part = part.value
    return part.id if isinstance(part, ast.Name) else ""


def _stored(statements: list[ast.stmt]) -> set[str]:
    nodes = [node for statement in statements for node in ast.walk(statement)]
    names = [node for node in nodes if isinstance(node, ast.Name)]
    return {node.id for node in names if not isinstance(node.ctx, ast.Load)}


def why_not_alone(function: Function, name: str, call: ast.Call) -> str:
    """Why a norm takes more than the sum, or others may use the sum's name; "" if neither."""
    if not call.args:
        return "the norm takes the sum by keyword"
    if len(call.args) != 1 or call.keywords:
        return "the norm takes more than the sum"
    if function.shared(name) is not None:
        return f"{name} is no name of this function alone"
    return ""
