"""Where a name gets its normalised heads, and whether the norm may wait until they are rotated."""

from __future__ import annotations

import ast
from typing import NamedTuple

from hf_kernel_patch.recognition.edits import Edit, replace
from hf_kernel_patch.recognition.function import Function, changes
from hf_kernel_patch.recognition.rules.statements import assigned, is_norm


class Normed(NamedTuple):
    """``name = self.norm(heads)``.

    Attributes:
        call: that of the norm.
        transpose: the call ``.transpose(1, 2)`` of the result, in the same statement or a later
            one; None where there is none.
        under: the ``if`` that it stands under, or None.
    """

    name: str
    call: ast.Call
    transpose: ast.Call | None = None
    under: ast.If | None = None

    @property
    def norm(self) -> ast.Attribute:
        norm = self.call.func
        assert isinstance(norm, ast.Attribute)
        return norm

    def text(self, function: Function, wanted: str) -> str:
        """The original's norm of the heads that the name holds after ``removed``, as source.

        ``wanted`` is the local name that keeps whether the condition of the norms held, or "".
        """
        text = f"{function.text(self.norm)}({self.name})"
        if wanted:
            text = f"({text} if {wanted} else {self.name})"
        return text if self.transpose is None else f"{text}.transpose(1, 2)"

    def removed(self, function: Function) -> list[Edit]:
        """Edits after which the name holds the heads as they are given to the norm."""
        heads = self.call.args[0]
        if self.transpose is None:
            return replace(function, self.call, "(", heads, ")")
        transposed, _ = _without_transpose(self.transpose)
        if transposed is self.call:
            return replace(function, self.transpose, "(", heads, ")")
        return [
            *replace(function, self.call, "(", heads, ")"),
            *replace(function, self.transpose, transposed),
        ]


class Guard(NamedTuple):
    """An ``if``, which is ``block[at]``."""

    statement: ast.If
    block: list[ast.stmt]
    at: int


def guarded(function: Function, block: list[ast.stmt]) -> Guard | None:
    """The ``if`` under which a block of statements runs where its condition holds."""
    for around in function.blocks:
        for at, statement in enumerate(around):
            if isinstance(statement, ast.If) and statement.body is block:
                return Guard(statement, around, at)
    return None


def normed(function: Function, name: str, block: list[ast.stmt], at: int) -> Normed | str | None:
    """Where a name gets the normalised heads that it holds before the statement ``block[at]``.

    Or why the norm cannot be computed in that statement instead; None where the block gives the
    name no value.
    """
    if function.shared(name) is not None:
        return f"{name} is no name of this function alone"
    transpose: ast.Call | None = None
    for before in range(at - 1, -1, -1):
        statement = block[before]
        to, value = assigned(statement)
        if value is not None and to == name:
            inner, outer = _without_transpose(value)
            if outer is not None and transpose is not None:
                return f"{name} is transposed twice"
            transpose = outer or transpose
            if (call := _norm(inner)) is not None:
                return Normed(name, call, transpose)
            if outer is not None and isinstance(inner, ast.Name) and inner.id == name:
                continue
            return _why_no_norm(name, statement, value, block[:before])
        if isinstance(statement, ast.If) and (call := _norm_under(statement, name)) is not None:
            return Normed(name, call, transpose, statement)
        if reason := why_not_past(name, statement):
            return reason
    if transpose is not None:
        return f"{name} is transposed, and no norm of it stands before"
    return None


def _without_transpose(value: ast.expr) -> tuple[ast.expr, ast.Call | None]:
    """(x, the call) of ``x.transpose(1, 2)``, or (the value, None)."""
    match value:
        case ast.Call(
            func=ast.Attribute(value=inner, attr=method),
            args=[ast.Constant(value=first), ast.Constant(value=second)],
            keywords=[],
        ) if method == "transpose" and (first, second) in ((1, 2), (2, 1)):
            return inner, value
    return value, None


def _norm(value: ast.expr) -> ast.Call | None:
    """A value that is ``self.norm(heads)``."""
    match value:
        case ast.Call(func=norm, args=[heads], keywords=[]) if is_norm(norm):
            return None if isinstance(heads, ast.Starred) else value
    return None


def _norm_under(statement: ast.If, name: str) -> ast.Call | None:
    """The norm of a name, where a condition decides on norms ``name = self.norm(name)`` alone."""
    found: dict[str, ast.Call] = {}
    for inner in statement.body:
        to, value = assigned(inner)
        call = None if value is None else _norm(value)
        if call is None or to in found:
            return None
        heads = call.args[0]
        if not isinstance(heads, ast.Name) or heads.id != to:
            return None
        found[to] = call
    return None if statement.orelse else found.get(name)


def _why_no_norm(name: str, statement: ast.stmt, value: ast.expr, before: list[ast.stmt]) -> str:
    """Why the value that a statement gives a name is no norm; ``before`` stand before it."""
    reads = {node.id for node in ast.walk(value) if isinstance(node, ast.Name)}
    given = [earlier for to, earlier in map(assigned, before) if to == name and earlier is not None]
    if name in reads and any(_norm(_without_transpose(v)[0]) is not None for v in given):
        return f"{name} is computed with in line {statement.lineno}, after its norm"
    return f"{name} of line {statement.lineno} is no self.norm(heads) of heads"


def why_not_past(name: str, part: ast.stmt | ast.expr) -> str:
    """Why the norm of a name cannot be computed after a part instead of before it."""
    for node in ast.walk(part):
        line = getattr(node, "lineno", part.lineno)
        if isinstance(node, ast.Name) and node.id == name:
            return f"{name} is used in line {line}, between its norm and the rotary function"
        if changes(node):
            return f"line {line} changes something between a norm and the rotary function"
        if isinstance(node, (ast.Break, ast.Continue)):
            return f"line {line} may leave a loop before the rotary function"
    return ""
