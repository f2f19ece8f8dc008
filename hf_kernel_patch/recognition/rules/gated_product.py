"""An activation times something else: ``act(gate) * up``, in a gated MLP and wherever it stands."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from typing import Any

from hf_kernel_patch.recognition.edits import replace
from hf_kernel_patch.recognition.function import Function, changes
from hf_kernel_patch.recognition.known import Found, Rule, register
from hf_kernel_patch.recognition.modules import activation_of
from hf_kernel_patch.recognition.site import Site


def find(function: Function, helper: str) -> Found:
    """``act(a) * b`` and ``b * act(a)`` become ``helper(self, act, a, b)``."""
    found = Found()
    if function.unfit is not None:
        found.miss(*function.unfit)
        return found
    for node in function.nodes:
        if not isinstance(node, ast.BinOp) or not isinstance(node.op, ast.Mult):
            continue
        first, second = node.left, node.right
        active: list[Any] = [one for one in (first, second) if _activates(one)]
        if not active:
            continue
        act: Any = active[0]
        leads = act is first
        other = second if leads else first
        if reason := _why_not(function, act, other, active):
            found.miss(node, reason)
            continue
        if leads:
            parts = [f"{helper}(self, ", act.func, ", ", act.args[0], ", ", other, ")"]
        else:
            parts = [f"{helper}(self, up=", other, ", activation=", act.func, ", gate="]
            parts += [act.args[0], ")"]
        found.edits += replace(function, node, *parts)
    return found


def _activates(node: ast.expr) -> Any:
    """The call of an activation function: a module of ``self`` of that name, or ``F.silu``."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return None
    owner, name = node.func.value, node.func.attr
    own = isinstance(owner, ast.Name) and owner.id == "self" and _ACTIVATION.search(name)
    return node if own or name == "silu" else None


#: "act_fn", "hidden_act", "activation_fn"; not "factor".
_ACTIVATION = re.compile(r"(?:^|_)act")


def _why_not(function: Function, act: ast.Call, other: ast.expr, active: list[Any]) -> str:
    if len(active) == 2:
        return "both factors are activations"
    if len(act.args) != 1 or act.keywords or isinstance(act.args[0], ast.Starred):
        return "the activation takes more than one argument"
    if isinstance(other, ast.Attribute):
        return f"{function.text(other)} may be a number or a weight"
    if _is_number(other):
        return "the activation is multiplied by a number"
    # The other factor is computed before the activation instead of after it.
    for part in (act.args[0], other):
        if any(isinstance(n, ast.NamedExpr) or changes(n) for n in ast.walk(part)):
            return "a factor changes something"
    return ""


def _is_number(node: ast.expr) -> bool:
    """Whether an expression is made of numbers and attributes alone."""
    if isinstance(node, ast.BinOp):
        return _is_number(node.left) and _is_number(node.right)
    if isinstance(node, ast.UnaryOp):
        return _is_number(node.operand)
    return isinstance(node, (ast.Constant, ast.Attribute))


def serve(site: Site) -> Callable[..., Any]:
    """(module, activation, gate, up) -> activation(gate) * up."""
    import torch

    tensor = torch.Tensor

    def gated_product(module: Any, activation: Any, gate: Any, up: Any) -> Any:
        name, why_not = activation_of(activation)
        if not (isinstance(gate, tensor) and isinstance(up, tensor)):
            why_not = "a factor is no tensor"
        if site.declines(gate, up, name, unless=why_not, module=module):
            return activation(gate) * up
        return site.op(gate, up, name)

    return gated_product


register(Rule("gated_product", "swiglu", find, serve, "swiglu"))
