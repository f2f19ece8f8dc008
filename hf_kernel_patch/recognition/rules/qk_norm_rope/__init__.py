"""Norms of every head of q and k, and then the rotary function, as in the attention of Qwen3."""

from __future__ import annotations

import ast

from hf_kernel_patch.recognition.edits import Part, replace
from hf_kernel_patch.recognition.function import Function
from hf_kernel_patch.recognition.known import Found, Rule, register
from hf_kernel_patch.recognition.rules.norm_classes import why_no_norm
from hf_kernel_patch.recognition.rules.qk_norm_rope.flow import (
    Normed,
    guarded,
    normed,
    why_not_past,
)
from hf_kernel_patch.recognition.rules.qk_norm_rope.serving import serve
from hf_kernel_patch.recognition.rules.statements import free_local, is_norm


def find(function: Function, helper: str) -> Found:
    """``q = self.q_norm(a).transpose(1, 2)``, the same of k, and ``q, k = rotary(q, k, cos, sin)``.

    The first become ``q = a`` and ``k = b``, and the rotary function's call
    ``helper(self, self.q_norm, self.k_norm, rotary, q, k, cos, sin)``. The transposes may stand
    before the norms or after them.
    """
    found = Found()
    if function.unfit is not None:
        found.miss(*function.unfit)
        return found
    if not any(map(is_norm, function.everything)):
        return found
    seen: set[int] = set()
    flags: list[str] = []
    for block in function.blocks:
        for at, statement in enumerate(block):
            call = getattr(statement, "value", None)
            if isinstance(call, ast.Call) and _is_rotary(call):
                seen.add(id(call))
                _look(function, found, helper, flags, block, at, call)
    for node in function.everything:
        if isinstance(node, ast.Call) and _is_rotary(node) and id(node) not in seen:
            found.miss(node, "the rotary function's results go elsewhere than to q and k")
    return found


def _is_rotary(call: ast.Call) -> bool:
    return isinstance(call.func, ast.Name) and call.func.id.startswith("apply_rotary")


def _look(
    function: Function,
    found: Found,
    helper: str,
    flags: list[str],
    block: list[ast.stmt],
    at: int,
    call: ast.Call,
) -> None:
    """Edit the norms and the rotary function that the statement ``block[at]`` calls.

    ``flags`` are the added local names that keep whether norms stand under a condition that held.
    """
    names = _heads_of(call)
    if names is None:
        found.miss(call, "the rotary function takes something else than q, k, cos and sin")
        return
    if _targets(block[at]) != names or names[0] == names[1]:
        found.miss(call, "the rotary function's results go elsewhere than to q and k")
        return
    if any(
        isinstance(n, (ast.Try, ast.TryStar)) and call in ast.walk(n) for n in function.everything
    ):
        found.miss(call, "it stands under try, where q and k may be used after an error")
        return
    both = [normed(function, name, block, at) for name in names]
    guard = guarded(function, block) if both == [None, None] else None
    if guard is not None:
        both = [
            why_not_past(name, guard.statement.test)
            or normed(function, name, guard.block, guard.at)
            for name in names
        ]
    ready = [heads for heads in both if isinstance(heads, Normed)]
    reasons = [reason for reason in both if isinstance(reason, str)]
    reasons += [f"{name} comes from elsewhere" for name, heads in zip(names, both) if heads is None]
    reasons += [why_no_norm(function, heads.norm) for heads in ready]
    if any(reasons):
        found.miss(call, next(filter(None, reasons)))
        return
    q, k = ready
    if (q.transpose is None, q.under) != (k.transpose is None, k.under):
        found.miss(call, "the norms of q and k stand in other places")
        return
    _rewrite(function, found, helper, flags, call, ready, guard.statement if guard else None)


def _heads_of(call: ast.Call) -> list[str] | None:
    """The names of q and k in a call ``rotary(q, k, cos, sin)`` whose cos and sin read neither."""
    match call:
        case ast.Call(args=[ast.Name(id=q), ast.Name(id=k), cos, sin], keywords=[]):
            nodes = [node for part in (cos, sin) for node in ast.walk(part)]
            read = {node.id for node in nodes if isinstance(node, ast.Name)}
            if not any(isinstance(node, (ast.NamedExpr, ast.Starred)) for node in nodes):
                return None if read & {q, k} else [q, k]
    return None


def _targets(statement: ast.stmt) -> list[str]:
    match statement:
        case ast.Assign(targets=[ast.Tuple(elts=names)]):
            return [getattr(name, "id", "") for name in names]
    return []


def _rewrite(
    function: Function,
    found: Found,
    helper: str,
    flags: list[str],
    call: ast.Call,
    both: list[Normed],
    guard: ast.If | None,
) -> None:
    """Take the norms out; the rotary function's call becomes the helper's."""
    wanted = ""
    if (condition := both[0].under) is not None:
        wanted = free_local(function, "asked", flags)
        flags.append(wanted)
        test = condition.test
        found.edits += replace(function, test, f"({wanted} := ", test, ")")
    for heads in both:
        found.edits += heads.removed(function)
    if guard is not None:
        # The norms stand before the ``if``, the rotary function in it. Where it does not run, the
        # norms are still to be computed: in its condition, when that does not hold.
        late = sorted(both, key=lambda heads: (heads.call.lineno, heads.call.col_offset))
        done = ", ".join(f"{heads.name} := {heads.text(function, wanted)}" for heads in late)
        opening, closing = ("(", ")") if isinstance(guard.test, _LOOSE) else ("", "")
        parts = opening, guard.test, f"{closing} or not ({done})"
        found.edits += replace(function, guard.test, *parts)
    norms, labels = [function.text(heads.norm) for heads in both], ("", "", "", "", "")
    if wanted:
        norms = [f"{norm} if {wanted} else False" for norm in norms]
        # By name: a call by place of self and four or more arguments looks like the attention
        # interface to the rule that cuts an attention for decoding.
        labels = "rotary=", "q=", "k=", "cos=", "sin="
    text: list[Part] = [f"{helper}(self, {', '.join(norms)}"]
    for label, part in zip(labels, (call.func, *call.args)):
        text += [f", {label}", part]
    text.append(")" if both[0].transpose is not None else ", transpose=False)")
    found.edits += replace(function, call, *text)


#: What binds less than ``or``.
_LOOSE = ast.IfExp, ast.Lambda, ast.NamedExpr

register(Rule("qk_norm_rope", "qk_norm_rope", find, serve, "qk_norm_rope", names="^apply_rotary"))
