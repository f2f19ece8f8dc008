"""Norms of every head of q and k, and then the rotary function, in the attention of Qwen3."""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any, NamedTuple

from hf_kernel_patch.recognition.edits import replace
from hf_kernel_patch.recognition.function import Function, changes
from hf_kernel_patch.recognition.known import Found, Rule, register
from hf_kernel_patch.recognition.leaves.norms import modeling_of, norm_arguments, norms_in
from hf_kernel_patch.recognition.leaves.rotary import why_not_plain
from hf_kernel_patch.recognition.rules.residual_norm import assigned, is_norm
from hf_kernel_patch.recognition.site import Site


class _Normed(NamedTuple):
    """``name = self.norm(heads).transpose(1, 2)``."""

    value: ast.expr
    norm: ast.Attribute
    heads: ast.expr


def find(function: Function, helper: str) -> Found:
    """``q = self.q_norm(a).transpose(1, 2)``, the same of k, and ``rotary(q, k, cos, sin)``.

    The first become ``q = a`` and ``k = b``, and the rotary function's call
    ``helper(self, self.q_norm, self.k_norm, rotary, q, k, cos, sin)``.
    """
    found = Found()
    if function.unfit is not None:
        found.miss(*function.unfit)
        return found
    if not any(is_norm(node) for node in ast.walk(function.node)):
        return found
    seen: set[int] = set()
    for block in function.blocks:
        for place, statement in enumerate(block):
            call = getattr(statement, "value", None)
            if isinstance(call, ast.Call) and _is_rotary(call):
                seen.add(id(call))
                _look(function, found, helper, block[: place + 1], call)
    for node in ast.walk(function.node):
        if isinstance(node, ast.Call) and _is_rotary(node) and id(node) not in seen:
            found.miss(node, "the rotary function's results go elsewhere than to q and k")
    return found


def _is_rotary(call: ast.Call) -> bool:
    return isinstance(call.func, ast.Name) and call.func.id.startswith("apply_rotary")


def _look(
    function: Function, found: Found, helper: str, block: list[ast.stmt], call: ast.Call
) -> None:
    """At a call of the rotary function; its statement is the last of the block."""
    arguments = call.args
    if len(arguments) != 4 or call.keywords or not all(isinstance(a, ast.Name) for a in arguments):
        found.miss(call, "the rotary function takes something else than q, k, cos and sin")
        return
    q, k = (argument.id for argument in arguments[:2])  # type: ignore[attr-defined]
    if _targets(block[-1]) != [q, k] or q == k:
        found.miss(call, "the rotary function's results go elsewhere than to q and k")
        return
    normed: list[_Normed] = []
    for name in (q, k):
        one = _normed(function, name, block)
        if isinstance(one, str):
            found.miss(call, one)
            return
        normed.append(one)
    for one in normed:
        found.edits += replace(function, one.value, "(", one.heads, ")")
    norms = ", ".join(function.text(one.norm) for one in normed)
    parts: list[Any] = [f"{helper}(self, {norms}, ", call.func, ", "]
    for argument in arguments:
        parts += [argument, ", "]
    found.edits += replace(function, call, *parts[:-1], ")")


def _targets(statement: ast.stmt) -> list[str]:
    match statement:
        case ast.Assign(targets=[ast.Tuple(elts=names)]):
            return [getattr(one, "id", "") for one in names]
    return []


def _normed(function: Function, name: str, block: list[ast.stmt]) -> _Normed | str:
    """Where a name gets its normed heads in a block, or why the norm cannot wait for the end."""
    if function.shared(name) is not None:
        return f"{name} is no name of this function alone"
    for place in range(len(block) - 2, -1, -1):
        to, value = assigned(block[place])
        if to != name:
            if reason := _why_not_later(name, block[place]):
                return reason
            continue
        match value:
            case ast.Call(
                func=ast.Attribute(value=ast.Call(func=norm, args=[heads], keywords=[]), attr=turn),
                args=[ast.Constant(value=1), ast.Constant(value=2)],
                keywords=[],
            ) if turn == "transpose" and is_norm(norm) and not isinstance(heads, ast.Starred):
                return _Normed(value, norm, heads)  # type: ignore[arg-type]
        return f"{name} of line {block[place].lineno} is no self.norm(heads).transpose(1, 2)"
    return f"{name} comes from elsewhere"


def _why_not_later(name: str, statement: ast.stmt) -> str:
    """Why the norm of a name cannot be computed after a statement instead of before it."""
    for node in ast.walk(statement):
        if isinstance(node, ast.Name) and node.id == name:
            return f"{name} is used in line {node.lineno}, between its norm and the rotary function"
        if changes(node):
            line = getattr(node, "lineno", statement.lineno)
            return f"line {line} changes something between a norm and the rotary function"
    return ""


def serve(site: Site) -> Callable[..., Any]:
    """(module, q_norm, k_norm, rotary, q, k, cos, sin) -> rotated q and k, (B, heads, S, D).

    q and k come as (B, S, heads, D), before their norms.
    """
    known = norms_in(modeling_of(site.original))

    def qk_norm_rope(
        module: Any, q_norm: Any, k_norm: Any, rotary: Any, q: Any, k: Any, cos: Any, sin: Any
    ) -> Any:
        if site.active:
            (q_weight, *q_options), why_not = norm_arguments(q_norm, known)
            (k_weight, *k_options), why_k_not = norm_arguments(k_norm, known)
            why_not = why_not or why_k_not
            if q_options != k_options:
                why_not = why_not or "the norms of q and k differ"
            why_not = why_not or why_not_plain(rotary)
            arguments = (q, k, q_weight, k_weight, q_options[0], cos, sin, 1, *q_options[1:])
            if not site.declines(*arguments, unless=why_not, module=module):
                return site.op(*arguments)
        return rotary(q_norm(q).transpose(1, 2), k_norm(k).transpose(1, 2), cos, sin)

    return qk_norm_rope


register(Rule("qk_norm_rope", "qk_norm_rope", find, serve, "qk_norm_rope"))
