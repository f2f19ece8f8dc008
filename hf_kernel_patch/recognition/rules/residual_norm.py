"""A sum and the norm of it: what a layer adds to its residual, and the norm before its MLP."""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

from hf_kernel_patch.recognition.edits import Edit, end, insert, replace, start
from hf_kernel_patch.recognition.function import Function
from hf_kernel_patch.recognition.known import Found, Rule, register
from hf_kernel_patch.recognition.leaves.norms import modeling_of, norm_arguments, norms_in
from hf_kernel_patch.recognition.rules.decoding.entry import entry
from hf_kernel_patch.recognition.site import Site

_NORMED = "normed"


def find(function: Function, helper: str) -> Found:
    """``s = x + y`` and, with no more than renaming between, ``z = self.norm(s)``.

    They become ``s, normed = helper(self, self.norm, x, y)`` and ``z = normed``.
    """
    found = Found()
    if function.unfit is not None:
        found.miss(*function.unfit)
        return found
    normed = _NORMED
    while normed in function.names:
        normed += "_"
    for block in function.blocks:
        for place, statement in enumerate(block):
            name, value = assigned(statement)
            if name and isinstance(value, ast.BinOp) and isinstance(value.op, ast.Add):
                _look(function, found, helper, normed, block[place:])
    if not found.edits and not found.near:
        _nearly(function, found)
    return found


def _look(
    function: Function, found: Found, helper: str, normed: str, block: list[ast.stmt]
) -> None:
    """At a sum, and what follows it."""
    name, value = assigned(block[0])
    names = {name}
    for place, statement in enumerate(block[1:], 1):
        to, given = assigned(statement)
        if norm := _norm_of(given, names):
            if reason := _why_not(function, name, given):
                found.miss(statement, reason)
                return
            targets = _with_another(function, block[0], normed)
            if not targets:
                found.miss(block[0], "the annotation stands in parentheses")
                return
            assert isinstance(value, ast.BinOp) and isinstance(norm, ast.Attribute)
            call = f"{helper}(self, {function.text(norm)}, "
            found.edits += targets
            found.edits += replace(function, value, call, value.left, ", ", value.right, ")")
            found.edits += replace(function, given, normed)
            return
        if isinstance(given, ast.Name) and to:
            # A name for the sum, or for something else; either may be the sum's own name.
            names = names | {to} if given.id in names else names - {to}
            continue
        if _normed_in(statement, names):
            found.miss(statement, _why_no_name(statement))
        elif _normed_after(block[place:], names):
            found.miss(statement, "between the sum and its norm stands other code")
        return


def assigned(statement: ast.stmt) -> tuple[str, Any]:
    """(name, value) of an assignment to one name, else ("", None)."""
    target = target_of(statement)
    return ("", None) if target is None else (target.id, statement.value)  # type: ignore[attr-defined]


def target_of(statement: ast.stmt) -> ast.Name | None:
    """The name that an assignment gives a value, if it is one name."""
    match statement:
        case ast.Assign(targets=[ast.Name() as target]):
            return target
        case ast.AnnAssign(target=ast.Name() as target, value=ast.expr(), simple=1):
            return target
    return None


def _with_another(function: Function, statement: Any, name: str) -> list[Edit]:
    """Edits that add a second target; an annotation goes, which Python does not evaluate here."""
    if isinstance(statement, ast.Assign):
        return [insert(end(statement.targets[0]), f", {name}")]
    target, annotation = statement.target, statement.annotation
    if function.between(end(target), start(annotation)).strip() != ":":
        return []
    breaks = "\n" * (end(annotation)[0] - end(target)[0])
    return [
        insert(start(target), "("),
        Edit(end(target), end(annotation), f", {name}{breaks})"),
    ]


def _norm_of(value: Any, names: set[str]) -> Any:
    """The norm that a call ``self.norm(name)`` calls, if the name is one of these."""
    if not isinstance(value, ast.Call) or not is_norm(value.func):
        return None
    given = [*value.args, *(keyword.value for keyword in value.keywords)]
    first = given[0] if given else None
    return value.func if isinstance(first, ast.Name) and first.id in names else None


def is_norm(node: Any) -> bool:
    """Whether an expression is an attribute of ``self`` that is named as a norm is."""
    return (
        isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
        and "norm" in node.attr.lower()
    )


def _why_not(function: Function, name: str, call: ast.Call) -> str:
    if not call.args:
        return "the norm takes the sum by keyword"
    if len(call.args) != 1 or call.keywords:
        return "the norm takes more than the sum"
    if function.shared(name) is not None:
        return f"{name} is no name of this function alone"
    return ""


def _why_no_name(statement: ast.stmt) -> str:
    """Why a statement with the norm in it is no ``z = self.norm(s)``."""
    if isinstance(statement, (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Return, ast.Expr)):
        return "the norm's result is not given one name"
    return "the norm stands in another block than the sum"


def _normed_in(statement: ast.stmt, names: set[str]) -> bool:
    return any(_norm_of(node, names) is not None for node in ast.walk(statement))


def _normed_after(statements: list[ast.stmt], names: set[str]) -> bool:
    """Whether a norm of one of the names follows, before it gets another value."""
    for statement in statements:
        if _normed_in(statement, names):
            return True
        names = names - {
            node.id
            for node in ast.walk(statement)
            if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)
        }
    return False


def _nearly(function: Function, found: Found) -> None:
    """Norms of sums that are spelled in another way."""
    sums = [node for node in ast.walk(function.node) if _adds(node)]
    calls = [n for n in ast.walk(function.node) if isinstance(n, ast.Call) and is_norm(n.func)]
    for call in calls:
        first = call.args[0] if call.args else None
        if any(isinstance(n, ast.BinOp) and isinstance(n.op, ast.Add) for n in ast.walk(call)):
            found.miss(call, "the sum has no statement of its own")
        elif isinstance(first, ast.Name):
            sums_of_it = [one for one in sums if first.id in _stored(one)]
            before = [one for one in sums_of_it if start(one) < start(call)]
            if before:
                last = max(before, key=start)
                later = [n for n in function.stores(first.id) if end(last) < start(n) < start(call)]
                if later:
                    found.miss(later[0], f"{first.id} gets another value before the norm")
                else:
                    found.miss(last, _why_no_sum(last))


def _adds(node: Any) -> bool:
    if isinstance(node, ast.AugAssign):
        return isinstance(node.op, ast.Add)
    kinds = ast.Assign, ast.AnnAssign, ast.NamedExpr
    value = node.value if isinstance(node, kinds) else None
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


def serve(site: Site) -> Callable[..., Any]:
    """(module, norm, x, y) -> (x + y, norm(x + y))."""
    import torch

    tensor, known = torch.Tensor, norms_in(modeling_of(site.original))

    def add_rms_norm(module: Any, norm: Any, left: Any, right: Any) -> Any:
        arguments, why_not = norm_arguments(norm, known)
        if not (isinstance(left, tensor) and isinstance(right, tensor)):
            why_not = "a summand is no tensor"
        if not site.declines(right, left, *arguments, unless=why_not, module=module):
            return site.op(right, left, *arguments)
        total = left + right
        return total, norm(total)

    return add_rms_norm


register(Rule("residual_norm", "add_rms_norm", find, serve, "add_rms_norm", entry=entry))
