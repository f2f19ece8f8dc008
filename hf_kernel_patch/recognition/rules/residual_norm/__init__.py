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
    target_of,
)
from hf_kernel_patch.recognition.site import Site

__all__ = ["assigned", "find", "is_norm", "serve", "target_of"]


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
        for place, statement in enumerate(block):
            name, value = assigned(statement)
            if name and _adds(value):
                _look(function, found, helper, normed, block[place:])
    for node in function.nodes:
        if isinstance(node, ast.Call) and is_norm(node.func) and [*map(_adds, node.args)] == [True]:
            _look_inside(function, found, helper, node)
    if not found.edits and not found.near:
        nearly(function, found)
    return found


def _adds(value: Any) -> bool:
    return isinstance(value, ast.BinOp) and isinstance(value.op, ast.Add)


def _look(
    function: Function, found: Found, helper: str, normed: str, block: list[ast.stmt]
) -> None:
    """At a sum, and what follows it."""
    name, _ = assigned(block[0])
    names = {name}
    for place, statement in enumerate(block[1:], 1):
        call, condition = norm_run_first(statement, names), None
        elsewhere: list[ast.stmt] = []
        if call is None and isinstance(statement, ast.If):
            call, condition = norm_under(statement, names, block[:place]), statement.test
            elsewhere = statement.orelse
        if call is not None:
            if reason := changed_later(function, names, call, elsewhere):
                found.miss(call, reason)
            else:
                _fuse(function, found, helper, normed, block[0], call, condition)
            return
        to, given = assigned(statement)
        if isinstance(given, ast.Name) and to:
            # A name for the sum, or for something else; either may be the sum's own name.
            names = names | {to} if given.id in names else names - {to}
            continue
        if reason := why_not_here(block[place:], names):
            found.miss(statement, reason)
        return


def _fuse(
    function: Function,
    found: Found,
    helper: str,
    normed: str,
    sum_: ast.stmt,
    call: ast.Call,
    condition: ast.expr | None,
) -> None:
    """A sum and the call of its norm, which may stand under a condition."""
    name, value = assigned(sum_)
    norm: Any = call.func
    if reason := why_not_alone(function, name, call) or why_no_norm(function, norm):
        found.miss(call, reason)
        return
    targets = _with_another(function, sum_, normed)
    if not targets:
        found.miss(sum_, "the annotation stands in parentheses")
        return
    asked = function.text(norm)
    if condition is not None:
        asked = f"{asked} if {on_one_line(function, condition)} else False"
        found.edits += replace(function, condition, f"{normed} is not None")
    found.edits += targets
    parts = f"{helper}(self, {asked}, ", value.left, ", ", value.right, ")"
    found.edits += replace(function, value, *parts)
    found.edits += replace(function, call, normed)


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


def _look_inside(function: Function, found: Found, helper: str, call: ast.Call) -> None:
    """At a norm that is given a sum."""
    total: Any = call.args[0]
    if call.keywords:
        found.miss(call, "the norm takes more than the sum")
    elif reason := why_no_norm(function, call.func):  # type: ignore[arg-type]
        found.miss(call, reason)
    else:
        parts = f"{helper}(self, ", call.func, ", ", total.left, ", ", total.right, ")[1]"
        found.edits += replace(function, call, *parts)


def serve(site: Site) -> Callable[..., Any]:
    """(module, norm, x, y) -> (x + y, norm(x + y)).

    (x + y, None) where the norm is False, as one under a condition is that does not hold.
    """
    import torch

    tensor, known = torch.Tensor, norms_in(modeling_of(site.original))

    def add_rms_norm(module: Any, norm: Any, left: Any, right: Any) -> Any:
        if norm is False:
            return left + right, None
        arguments, why_not = norm_arguments(norm, known)
        if not (isinstance(left, tensor) and isinstance(right, tensor)):
            why_not = "a summand is no tensor"
        if not site.declines(right, left, *arguments, unless=why_not, module=module):
            return site.op(right, left, *arguments)
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
        entry=entry,
        names="(?i)norm",
        usual=r"\w*DecoderLayer\.forward\(",
    )
)
