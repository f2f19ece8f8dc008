"""Why code that looks like a sum and its norm is left as it is."""

from __future__ import annotations

import ast
from itertools import pairwise

from hf_kernel_patch.recognition.edits import end, start
from hf_kernel_patch.recognition.function import Function
from hf_kernel_patch.recognition.known import Found
from hf_kernel_patch.recognition.rules.norm_classes import why_no_norm
from hf_kernel_patch.recognition.rules.residual_norm.norms import norm_of_sum
from hf_kernel_patch.recognition.rules.statements import assigned, is_norm, target_of


def why_not_here(statements: list[ast.stmt], names: set[str]) -> str:
    """Why the first of the statements after a sum keeps it from its norm; "" if no norm follows."""
    first = statements[0]
    if _normed_in(first, names):
        if isinstance(first, _SIMPLE):
            return "other code runs between the sum and its norm"
        return "the norm stands in another block than the sum"
    return "between the sum and its norm stands other code" if _normed(statements, names) else ""


_SIMPLE = ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Return, ast.Expr


def _normed_in(statement: ast.stmt, names: set[str]) -> bool:
    return any(norm_of_sum(node, names) is not None for node in ast.walk(statement))


def _normed(statements: list[ast.stmt], names: set[str]) -> bool:
    """Whether a norm of one of the names follows, before that name gets another value."""
    for statement in statements:
        if _normed_in(statement, names):
            return True
        names = names - {
            node.id
            for node in ast.walk(statement)
            if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)
        }
    return False


def nearly(function: Function, found: Found) -> None:
    """Note norms of sums that are written in another way, and sums of what a norm gives."""
    sums = [node for node in function.everything if _adds(node)]
    calls = [n for n in function.everything if isinstance(n, ast.Call) and is_norm(n.func)]
    for call in calls:
        first = call.args[0] if call.args else None
        if any(isinstance(n, ast.BinOp) and isinstance(n.op, ast.Add) for n in ast.walk(call)):
            found.miss(call, "the sum has no statement of its own")
        elif isinstance(first, ast.Name):
            of_name = [node for node in sums if first.id in _stored(node)]
            before = [node for node in of_name if start(node) < start(call)]
            if before:
                last = max(before, key=start)
                later = [n for n in function.stores(first.id) if end(last) < start(n) < start(call)]
                if later:
                    found.miss(later[0], f"{first.id} gets another value before the norm")
                else:
                    found.miss(last, _why_no_sum(last))
    if not found.near:
        for block in function.blocks:
            _after_norms(function, block, found)


def _after_norms(function: Function, block: list[ast.stmt], found: Found) -> None:
    """Note sums of a residual and what a norm gave in the statement before (post-norm)."""
    for statement, following in pairwise(block):
        name, value = assigned(statement)
        summed = getattr(following, "value", None)
        norm = value.func if isinstance(value, ast.Call) else None
        if isinstance(norm, ast.Attribute) and is_norm(norm) and _adds(following):
            operands = [getattr(summed, side, None) for side in ("left", "right")]
            added = any(isinstance(n, ast.Name) and n.id == name for n in operands)
            if added and not why_no_norm(function, norm):
                found.miss(following, "the norm comes before the sum (post-norm)")


def _adds(node: ast.AST) -> bool:
    if isinstance(node, ast.AugAssign):
        return isinstance(node.op, ast.Add)
    assigns = ast.Assign, ast.AnnAssign, ast.NamedExpr
    value = node.value if isinstance(node, assigns) else None
    return isinstance(value, ast.BinOp) and isinstance(value.op, ast.Add)


def _stored(statement: ast.AST) -> set[str]:
    names = [node for node in ast.walk(statement) if isinstance(node, ast.Name)]
    return {node.id for node in names if isinstance(node.ctx, ast.Store)}


def _why_no_sum(node: ast.AST) -> str:
    if isinstance(node, ast.AugAssign):
        return "the sum is in place"
    if not isinstance(node, ast.stmt) or target_of(node) is None:
        return "the sum is not given one name"
    return "the norm stands in another block than the sum"
