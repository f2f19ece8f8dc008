"""An activation times something else: ``act(gate) * up``, in a gated MLP and wherever it stands."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from typing import Any, NamedTuple, TypeGuard

from hf_kernel_patch.recognition.edits import end, replace, start
from hf_kernel_patch.recognition.function import Function, changes
from hf_kernel_patch.recognition.known import Found, Rule, register
from hf_kernel_patch.recognition.modules import activation_of
from hf_kernel_patch.recognition.rules.statements import assigned
from hf_kernel_patch.recognition.site import Site


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
        if _is_product(node):
            calls: list[Any] = [one for one in (node.left, node.right) if _activates(one)]
            if calls:
                _product(function, found, helper, node, calls)
    taken: set[int] = set()
    for block in function.blocks:
        for place, statement in enumerate(block):
            name, act = assigned(statement)
            if _activates(act):
                _named(function, found, helper, _Step(block, place, name, act), taken)
    return found


def _is_product(node: ast.AST) -> TypeGuard[ast.BinOp]:
    return isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult)


def _activates(node: Any) -> bool:
    """Whether this calls an activation: a module of self of such a name, F.silu or F.gelu."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return False
    owner, name = node.func.value, node.func.attr
    own = isinstance(owner, ast.Name) and owner.id == "self"
    return bool(_ACTIVATION.search(name)) if own else name in ("silu", "gelu")


#: "act_fn", "hidden_act", "activation_fn", "silu"; not "factor".
_ACTIVATION = re.compile(r"(?:^|_)(?:act|silu|gelu|swish)")


def _product(
    function: Function, found: Found, helper: str, node: ast.BinOp, calls: list[ast.Call]
) -> None:
    """At a product with an activation for a factor."""
    act = calls[0]
    leads = act is node.left
    other = node.right if leads else node.left
    reason = "both factors are activations" if len(calls) == 2 else ""
    reason = reason or _why_not_active(act) or _why_not_other(function, other)
    # A fused activation is computed after the other factor instead of before it.
    if not reason and any(_changes(part) for part in (act.args[0], other)):
        reason = "a factor changes something"
    if reason:
        found.miss(node, reason)
        return
    option = f", approximate={_approximate(act)!r})" if act.keywords else ")"
    parts: list[Any]
    if not leads:
        parts = [f"{helper}(self, up=", other, ", activation=", act.func, ", gate=", act.args[0]]
        found.edits += replace(function, node, *parts, option)
    elif any(isinstance(part, ast.Call) for part in ast.walk(other)):
        # One that is not fused runs before the other factor's calls, as they may tell.
        parts = [f"{helper}(self, ..., {helper}(self, ", act.func, ", ", act.args[0], option]
        found.edits += replace(function, node, *parts, ", ", other, ")")
    else:
        parts = [f"{helper}(self, ", act.func, ", ", act.args[0], ", ", other, option]
        found.edits += replace(function, node, *parts)


def _why_not_active(act: ast.Call) -> str:
    several = len(act.args) != 1 or isinstance(act.args[0], ast.Starred)
    if several or (act.keywords and _approximate(act) is None):
        return "the activation takes more than one argument"
    return ""


def _approximate(act: ast.Call) -> str | None:
    """How gelu is approximated, where that is the only option."""
    match act:
        case ast.Call(
            func=ast.Attribute(attr="gelu"),
            keywords=[ast.keyword(arg="approximate", value=ast.Constant(value=str(value)))],
        ):
            return value
    return None


def _why_not_other(function: Function, other: ast.expr) -> str:
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


def _changes(part: ast.AST) -> bool:
    return any(isinstance(node, ast.NamedExpr) or changes(node) for node in ast.walk(part))


# -- where the activation has a name


class _Step(NamedTuple):
    """``name = act(a)``, the statement at a place of a block."""

    block: list[ast.stmt]
    place: int
    name: str
    act: ast.Call


def _named(function: Function, found: Found, helper: str, step: _Step, taken: set[int]) -> None:
    """At an activation that has a name; ``taken`` are products that are done."""
    following = enumerate(step.block[step.place + 1 :], step.place + 1)
    last = next((place for place, one in following if _names(one, step.name)), None)
    product = None if last is None else _product_of(step.block[last], step.name)
    if last is None or product is None or id(product) in taken:
        return
    leads = isinstance(product.left, ast.Name) and product.left.id == step.name
    name, other = (product.left, product.right) if leads else (product.right, product.left)
    if _activates(other):
        return
    act = step.act
    reason = _why_not_active(act) or _why_not_other(function, other)
    if reason := reason or _why_not_later(function, step, last):
        found.miss(product, reason)
        return
    taken.add(id(product))
    option = f", approximate={_approximate(act)!r})" if act.keywords else ")"
    found.edits += replace(function, act, f"{helper}(self, ", act.func, ", ", act.args[0], option)
    parts: list[Any] = [f"{helper}(self, ..., ", name, ", ", other, ")"]
    if not leads:
        parts = [f"{helper}(self, up=", other, ", activation=..., gate=", name, ")"]
    found.edits += replace(function, product, *parts)


def _names(part: ast.AST, name: str) -> list[ast.Name]:
    """Where a part has a name, whatever it does with it."""
    return [n for n in ast.walk(part) if isinstance(n, ast.Name) and n.id == name]


def _product_of(statement: ast.stmt, name: str) -> ast.BinOp | None:
    """The product in a statement that has the name for a factor."""
    products = [node for node in ast.walk(statement) if _is_product(node)]
    for node in products:
        if any(isinstance(one, ast.Name) and one.id == name for one in (node.left, node.right)):
            return node
    return None


_SIMPLE = ast.Assign, ast.AnnAssign, ast.Return, ast.Expr
_AROUND = ast.For, ast.While, ast.With, ast.Try, ast.TryStar
_LATER = ast.ListComp, ast.SetComp, ast.DictComp


def _why_not_later(function: Function, step: _Step, last: int) -> str:
    """Why an activation cannot be computed in the statement ``last`` instead of in its own.

    It changes nothing itself, so all that counts is that nobody else has its value, and that what
    it is computed of stays as it is.
    """
    block, place, name, _ = step
    product = block[last]
    if function.shared(name) is not None:
        return f"{name} is no name of this function alone"
    if not isinstance(product, _SIMPLE) or any(isinstance(n, _LATER) for n in ast.walk(product)):
        return f"{name} may be used more than once, or not at all"
    for statement in block[place + 1 : last + 1]:
        for node in ast.walk(statement):
            if changes(node):
                line = getattr(node, "lineno", statement.lineno)
                return f"line {line} changes something after the activation"
    if (again := _used_again(function, step, last)) is not None:
        return f"{name} is used in line {again.lineno} too"
    return ""


def _used_again(function: Function, step: _Step, last: int) -> Any:
    """Something else than the product that may read the activation's name, or None."""
    block, place, name, act = step
    reads = [node for node in ast.walk(function.node) if _reads(node, name)]
    factor = next(node for node in reads if any(node is n for n in ast.walk(block[last])))
    reads = [node for node in reads if node is not factor]
    texts = [n for n in ast.walk(function.node) if isinstance(n, ast.JoinedStr) and _names(n, name)]
    if texts:  # whose parts have no places of their own in every Python
        return texts[0]
    stores = [one for one in block[last:] if assigned(one)[0] == name]
    around = [n for n in ast.walk(function.node) if isinstance(n, _AROUND)]
    if any(block[place] is one for n in around for one in ast.walk(n)):
        # It may go around, or on elsewhere: nothing else may read it but what is made of another
        # value in the same round.
        fresh = any(assigned(one)[0] == name for one in block[:place])
        own = [node for node in reads if fresh and any(node is n for n in ast.walk(act))]
        return next((node for node in reads if all(node is not n for n in own)), None)
    after = [node for node in reads if start(node) > start(block[place])]
    after = [node for node in after if all(node is not n for n in ast.walk(act))]
    over = end(stores[0]) if stores else None
    return next((node for node in after if over is None or start(node) < over), None)


def _reads(node: ast.AST, name: str) -> bool:
    match node:
        case ast.Name(id=found, ctx=ast.Load()) | ast.AugAssign(target=ast.Name(id=found)):
            return found == name
    return False


# -- what runs in their place


class _Kept(NamedTuple):
    """What an activation is computed of, until the product is."""

    gate: Any
    name: str
    activation: Any
    approximate: str | None


def serve(site: Site) -> Callable[..., Any]:
    """(module, activation, gate, up) -> activation(gate) * up.

    Without ``up`` activation(gate) or what the product needs of it, which comes as ``gate`` then.
    """
    import torch

    tensor = torch.Tensor

    def gated_product(
        module: Any, activation: Any, gate: Any, up: Any = ..., approximate: Any = None
    ) -> Any:
        if activation is not ...:
            name, why_not = activation_of(activation, approximate)
            if up is ...:
                if why_not is None and site.in_force(module):
                    return _Kept(gate, name, activation, approximate)
                site.declines(unless=why_not, module=module)
                return _activated(activation, gate, approximate)
        elif type(gate) is _Kept:
            gate, name, activation, approximate = gate
            why_not = None
        else:
            return gate * up
        if not (isinstance(gate, tensor) and isinstance(up, tensor)):
            why_not = "a factor is no tensor"
        if site.declines(gate, up, name, unless=why_not, module=module):
            return _activated(activation, gate, approximate) * up
        return site.op(gate, up, name)

    return gated_product


def _activated(activation: Any, gate: Any, approximate: str | None) -> Any:
    if approximate is None:
        return activation(gate)
    return activation(gate, approximate=approximate)


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
