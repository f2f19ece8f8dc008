"""An activation times something else: ``act(gate) * up``, in a gated MLP and in other code."""

from __future__ import annotations

import ast

from hf_kernel_patch.recognition.edits import Part, replace
from hf_kernel_patch.recognition.function import Function, changes
from hf_kernel_patch.recognition.known import Found, Rule, register
from hf_kernel_patch.recognition.rules.gated_product.expressions import (
    approximate,
    is_activation,
    is_product,
    why_not_activation,
    why_not_factor,
)
from hf_kernel_patch.recognition.rules.gated_product.named import Step, find_named
from hf_kernel_patch.recognition.rules.gated_product.serving import serve
from hf_kernel_patch.recognition.rules.statements import assigned


def find(function: Function, helper: str) -> Found:
    """``act(a) * b`` and ``b * act(a)`` become ``helper(self, act, a, b)``.

    Where the activation has a name, ``name = act(a)`` and later ``name * b``, these become
    ``name = helper(self, act, a)``, which may keep ``a``, and ``helper(self, ..., name, b)``.
    """
    found = Found()
    if function.unfit is not None:
        found.miss(*function.unfit)
        return found
    for node in function.nodes:
        if is_product(node):
            calls = [factor for factor in (node.left, node.right) if is_activation(factor)]
            if calls:
                _product(function, found, helper, node, calls)
    done: set[int] = set()
    for block in function.blocks:
        for index, statement in enumerate(block):
            name, act = assigned(statement)
            if is_activation(act):
                find_named(function, found, helper, Step(block, index, name, act), done)
    return found


def _product(
    function: Function, found: Found, helper: str, node: ast.BinOp, calls: list[ast.Call]
) -> None:
    """Edit a product; ``calls`` are those of its factors that are activations."""
    act = calls[0]
    leads = act is node.left
    other = node.right if leads else node.left
    reason = "both factors are activations" if len(calls) == 2 else ""
    reason = reason or why_not_activation(act) or why_not_factor(function, other)
    # A fused activation is computed after the other factor instead of before it.
    if not reason and any(_changes(part) for part in (act.args[0], other)):
        reason = "a factor changes something"
    if reason:
        found.miss(node, reason)
        return
    option = f", approximate={approximate(act)!r})" if act.keywords else ")"
    parts: list[Part]
    if not leads:
        parts = [f"{helper}(self, up=", other, ", activation=", act.func, ", gate=", act.args[0]]
        found.edits += replace(function, node, *parts, option)
    elif any(isinstance(part, ast.Call) for part in ast.walk(other)):
        # On a fallback the activation has to run before the calls in the other factor, as the
        # original does it: hooks and random numbers show the order. So it has a call of its own.
        parts = [f"{helper}(self, ..., {helper}(self, ", act.func, ", ", act.args[0], option]
        found.edits += replace(function, node, *parts, ", ", other, ")")
    else:
        parts = [f"{helper}(self, ", act.func, ", ", act.args[0], ", ", other, option]
        found.edits += replace(function, node, *parts)


def _changes(part: ast.AST) -> bool:
    return any(isinstance(node, ast.NamedExpr) or changes(node) for node in ast.walk(part))


register(
    Rule(
        "gated_product",
        "swiglu",
        find,
        serve,
        "swiglu",
        names="act|silu|gelu",
        usual=r"\w*MLP\.forward\(",
    )
)
