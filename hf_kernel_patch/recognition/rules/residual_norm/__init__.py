"""A sum and the norm of it: what a layer adds to its residual, and the norm before its MLP."""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, TypeGuard

from hf_kernel_patch.recognition.edits import Edit, end, insert, replace, start
from hf_kernel_patch.recognition.function import Function
from hf_kernel_patch.recognition.known import Found, Rule, register
from hf_kernel_patch.recognition.leaves.norms import modeling_of, norm_arguments, norms_in
from hf_kernel_patch.recognition.rules.norm_classes import why_no_norm
from hf_kernel_patch.recognition.rules.residual_norm.near import nearly, why_not_here
from hf_kernel_patch.recognition.rules.residual_norm.norms import (
    changed_later,
    norm_run_first,
    norm_under,
    why_not_alone,
)
from hf_kernel_patch.recognition.rules.statements import (
    assigned,
    free_local,
    is_norm,
    on_one_line,
)
from hf_kernel_patch.recognition.site import Site

if TYPE_CHECKING:
    import torch
    from torch import nn


def find(function: Function, helper: str) -> Found:
    """``s = x + y`` and, with no more than renaming between, a statement that first runs a norm.

    ``s = x + y`` and ``z = self.norm(s)`` become ``s, normed = helper(self, self.norm, x, y)`` and
    ``z = normed``; ``self.norm(x + y)`` becomes ``helper(self, self.norm, x, y)[1]``.
    """
    found = Found()
    if function.unfit is not None:
        found.miss(*function.unfit)
        return found
    normed = free_local(function, "normed")
    for block in function.blocks:
        for index, statement in enumerate(block):
            _, value = assigned(statement)
            if value is not None and _adds(value):
                _look(function, found, helper, normed, block[index:], value)
    for node in function.nodes:
        if isinstance(node, ast.Call) and is_norm(node.func) and len(node.args) == 1:
            total = node.args[0]
            if _adds(total):
                _look_inside(function, found, helper, node, node.func, total)
    if not found.edits and not found.near:
        nearly(function, found)
    return found


def _adds(value: ast.expr) -> TypeGuard[ast.BinOp]:
    return isinstance(value, ast.BinOp) and isinstance(value.op, ast.Add)


def _look(
    function: Function,
    found: Found,
    helper: str,
    normed: str,
    block: list[ast.stmt],
    total: ast.BinOp,
) -> None:
    """Edit a sum, the value of the first statement of ``block``, and its norm, which follows."""
    name, _ = assigned(block[0])
    names = {name}
    for index, statement in enumerate(block[1:], 1):
        call, condition = norm_run_first(statement, names), None
        elsewhere: list[ast.stmt] = []
        if call is None and isinstance(statement, ast.If):
            call, condition = norm_under(statement, names, block[:index]), statement.test
            elsewhere = statement.orelse
        if call is not None:
            if reason := changed_later(function, names, call, elsewhere):
                found.miss(call, reason)
            else:
                _fuse(function, found, helper, normed, block[0], total, call, condition)
            return
        to, given = assigned(statement)
        if isinstance(given, ast.Name) and to:
            # Either a further name for the sum, or a name that no longer is one.
            names = names | {to} if given.id in names else names - {to}
            continue
        if reason := why_not_here(block[index:], names):
            found.miss(statement, reason)
        return


def _fuse(
    function: Function,
    found: Found,
    helper: str,
    normed: str,
    statement: ast.stmt,
    total: ast.BinOp,
    call: ast.Call,
    condition: ast.expr | None,
) -> None:
    """Edit a sum and the call of its norm, which may stand under a condition."""
    name, _ = assigned(statement)
    norm = call.func
    assert is_norm(norm)
    if reason := why_not_alone(function, name, call) or why_no_norm(function, norm):
        found.miss(call, reason)
        return
    targets = _with_second_target(function, statement, normed)
    if not targets:
        found.miss(statement, "the annotation stands in parentheses")
        return
    norm_text = function.text(norm)
    if condition is not None:
        norm_text = f"{norm_text} if {on_one_line(function, condition)} else False"
        found.edits += replace(function, condition, f"{normed} is not None")
    found.edits += targets
    parts = f"{helper}(self, {norm_text}, ", total.left, ", ", total.right, ")"
    found.edits += replace(function, total, *parts)
    found.edits += replace(function, call, normed)


def _with_second_target(function: Function, statement: ast.stmt, name: str) -> list[Edit]:
    """Edits that add a second target to an assignment; none where they cannot be made.

    An annotation is taken out, as two targets can have none; Python does not evaluate it here.
    """
    if isinstance(statement, ast.Assign):
        return [insert(end(statement.targets[0]), f", {name}")]
    assert isinstance(statement, ast.AnnAssign)
    target, annotation = statement.target, statement.annotation
    if function.between(end(target), start(annotation)).strip() != ":":
        return []
    breaks = "\n" * (end(annotation)[0] - end(target)[0])
    return [
        insert(start(target), "("),
        Edit(end(target), end(annotation), f", {name}{breaks})"),
    ]


def _look_inside(
    function: Function,
    found: Found,
    helper: str,
    call: ast.Call,
    norm: ast.Attribute,
    total: ast.BinOp,
) -> None:
    """Edit the call of a norm whose argument is a sum."""
    if call.keywords:
        found.miss(call, "the norm takes more than the sum")
    elif reason := why_no_norm(function, norm):
        found.miss(call, reason)
    else:
        parts = f"{helper}(self, ", norm, ", ", total.left, ", ", total.right, ")[1]"
        found.edits += replace(function, call, *parts)


#: A sum and its norm; None in place of the norm where it is not asked for.
SumAndNorm = tuple["torch.Tensor", "torch.Tensor | None"]


def serve(site: Site) -> Callable[..., SumAndNorm]:
    """(module, norm, x, y) -> (x + y, norm(x + y)).

    (x + y, None) where the norm is False: it stands under a condition that does not hold.
    """
    import torch

    tensor, known = torch.Tensor, norms_in(modeling_of(site.original))
    op: Callable[..., SumAndNorm] = site.op

    def add_rms_norm(
        module: nn.Module,
        norm: nn.Module | Literal[False],
        left: torch.Tensor,
        right: torch.Tensor,
    ) -> SumAndNorm:
        if norm is False:
            return left + right, None
        arguments, fallback = norm_arguments(norm, known)
        if not (isinstance(left, tensor) and isinstance(right, tensor)):
            fallback = "a summand is no tensor"
        if not site.falls_back(right, left, *arguments, unless=fallback, module=module):
            return op(right, left, *arguments)
        total = left + right
        return total, norm(total)

    return add_rms_norm


register(
    Rule(
        "residual_norm",
        "add_rms_norm",
        find,
        serve,
        "add_rms_norm",
        names="(?i)norm",
        usual=r"\w*DecoderLayer\.forward\(",
    )
)
