"""An activation that gets a name, and a later product with that name."""

from __future__ import annotations

import ast
from typing import NamedTuple, TypeGuard

from hf_kernel_patch.recognition.edits import Part, end, replace, start
from hf_kernel_patch.recognition.function import Function, changes
from hf_kernel_patch.recognition.known import Found
from hf_kernel_patch.recognition.rules.gated_product.expressions import (
    approximate,
    is_activation,
    is_product,
    why_not_activation,
    why_not_factor,
)
from hf_kernel_patch.recognition.rules.statements import assigned


class Step(NamedTuple):
    """``name = act(a)``, the statement ``block[at]``."""

    block: list[ast.stmt]
    at: int
    name: str
    act: ast.Call


def find_named(function: Function, found: Found, helper: str, step: Step, done: set[int]) -> None:
    """Edit an activation that has a name, and its product.

    ``done`` are the ids of products that were edited before.
    """
    following = enumerate(step.block[step.at + 1 :], step.at + 1)
    last = next((index for index, stmt in following if _names(stmt, step.name)), None)
    product = None if last is None else _product_of(step.block[last], step.name)
    if last is None or product is None or id(product) in done:
        return
    leads = isinstance(product.left, ast.Name) and product.left.id == step.name
    name, other = (product.left, product.right) if leads else (product.right, product.left)
    if is_activation(other):
        return
    act = step.act
    reason = why_not_activation(act) or why_not_factor(function, other)
    if reason := reason or _why_not_later(function, step, last):
        found.miss(product, reason)
        return
    done.add(id(product))
    option = f", approximate={approximate(act)!r})" if act.keywords else ")"
    found.edits += replace(function, act, f"{helper}(self, ", act.func, ", ", act.args[0], option)
    parts: list[Part] = [f"{helper}(self, ..., ", name, ", ", other, ")"]
    if not leads:
        parts = [f"{helper}(self, up=", other, ", activation=..., gate=", name, ")"]
    found.edits += replace(function, product, *parts)


def _names(part: ast.AST, name: str) -> list[ast.Name]:
    """Where a name stands in a part, whether it is read or stored."""
    return [n for n in ast.walk(part) if isinstance(n, ast.Name) and n.id == name]


def _product_of(statement: ast.stmt, name: str) -> ast.BinOp | None:
    """The product in a statement that has the name for a factor."""
    products = [node for node in ast.walk(statement) if is_product(node)]
    for node in products:
        factors = node.left, node.right
        if any(isinstance(factor, ast.Name) and factor.id == name for factor in factors):
            return node
    return None


_SIMPLE = ast.Assign, ast.AnnAssign, ast.Return, ast.Expr
#: Statements after which the code may run again or go on elsewhere.
_AROUND = ast.For, ast.While, ast.With, ast.Try, ast.TryStar
_COMPREHENSIONS = ast.ListComp, ast.SetComp, ast.DictComp


def _why_not_later(function: Function, step: Step, last: int) -> str:
    """Why an activation cannot be computed in the statement ``last`` instead of in its own, or "".

    The activation changes nothing. So it can be, if nothing else reads its value, and if what it is
    computed of does not change in between.
    """
    block, at, name, _ = step
    user = block[last]
    if function.shared(name) is not None:
        return f"{name} is no name of this function alone"
    if not isinstance(user, _SIMPLE) or any(isinstance(n, _COMPREHENSIONS) for n in ast.walk(user)):
        return f"{name} may be used more than once, or not at all"
    for statement in block[at + 1 : last + 1]:
        for node in ast.walk(statement):
            if changes(node):
                line = getattr(node, "lineno", statement.lineno)
                return f"line {line} changes something after the activation"
    if (again := _used_again(function, step, last)) is not None:
        return f"{name} is used in line {again.lineno} too"
    return ""


def _used_again(function: Function, step: Step, last: int) -> ast.expr | ast.stmt | None:
    """Something other than the product that may read the activation's value, or None."""
    block, at, name, act = step
    reads = [node for node in ast.walk(function.node) if _reads(node, name)]
    factor = next(node for node in reads if _contains(block[last], node))
    reads = [node for node in reads if node is not factor]
    texts = [n for n in ast.walk(function.node) if isinstance(n, ast.JoinedStr) and _names(n, name)]
    if texts:  # before Python 3.12 the parts of an f-string have no lines and columns
        return texts[0]
    stores = [statement for statement in block[last:] if assigned(statement)[0] == name]
    around = [n for n in ast.walk(function.node) if isinstance(n, _AROUND)]
    if any(_contains(statement, block[at]) for statement in around):
        # In a loop any read may see the activation of the round before. Only the activation's own
        # argument may read the name, if the same round gave it another value before.
        fresh = any(assigned(statement)[0] == name for statement in block[:at])
        return next((node for node in reads if not (fresh and _contains(act, node))), None)
    after = [node for node in reads if start(node) > start(block[at])]
    after = [node for node in after if not _contains(act, node)]
    over = end(stores[0]) if stores else None
    return next((node for node in after if over is None or start(node) < over), None)


def _contains(outer: ast.AST, node: ast.AST) -> bool:
    return any(node is inner for inner in ast.walk(outer))


def _reads(node: ast.AST, name: str) -> TypeGuard[ast.Name | ast.AugAssign]:
    match node:
        case ast.Name(id=found, ctx=ast.Load()) | ast.AugAssign(target=ast.Name(id=found)):
            return found == name
    return False
