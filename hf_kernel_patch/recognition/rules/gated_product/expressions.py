"""Which expressions are activations and products, and which of them the rule can fuse."""

from __future__ import annotations

import ast
import re
from typing import TypeGuard

from hf_kernel_patch.recognition.function import Function

#: "act_fn", "hidden_act", "activation_fn", "silu"; not "factor".
_ACTIVATION = re.compile(r"(?:^|_)(?:act|silu|gelu|swish)")


def is_product(node: ast.AST) -> TypeGuard[ast.BinOp]:
    """Whether this is ``a * b``."""
    return isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult)


def is_activation(node: ast.expr | None) -> TypeGuard[ast.Call]:
    """Whether this calls an activation: a module of self of such a name, F.silu or F.gelu."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return False
    owner, name = node.func.value, node.func.attr
    own = isinstance(owner, ast.Name) and owner.id == "self"
    return bool(_ACTIVATION.search(name)) if own else name in ("silu", "gelu")


def why_not_activation(act: ast.Call) -> str:
    """Why the call of an activation is none that the rule can fuse, or ""."""
    several = len(act.args) != 1 or isinstance(act.args[0], ast.Starred)
    if several or (act.keywords and approximate(act) is None):
        return "the activation takes more than one argument"
    return ""


def approximate(act: ast.Call) -> str | None:
    """How gelu is approximated, where that is its only option."""
    match act:
        case ast.Call(
            func=ast.Attribute(attr="gelu"),
            keywords=[ast.keyword(arg="approximate", value=ast.Constant(value=str(value)))],
        ):
            return value
    return None


def why_not_factor(function: Function, other: ast.expr) -> str:
    """Why the factor besides the activation is none that the rule can fuse, or ""."""
    if isinstance(other, ast.Attribute):
        return f"{function.text(other)} may be a number or a weight"
    return "the activation is multiplied by a number" if _is_number(other) else ""


def _is_number(node: ast.expr) -> bool:
    """Whether an expression is made of numbers and attributes alone."""
    if isinstance(node, ast.BinOp):
        return _is_number(node.left) and _is_number(node.right)
    if isinstance(node, ast.UnaryOp):
        return _is_number(node.operand)
    return isinstance(node, (ast.Constant, ast.Attribute))
