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
        turn: the ``.transpose(1, 2)`` of the result, there or later; None where there is none.
        asked: the ``if`` that it stands under, if any.
    """

    name: str
    call: ast.Call
    turn: ast.Call | None = None
    asked: ast.If | None = None

    @property
    def norm(self) -> ast.Attribute:
        return self.call.func  # type: ignore[return-value]

    def text(self, function: Function, wanted: str) -> str:
        """What the original computes of the heads that the name holds when it is not done yet.

        ``wanted`` is the name that keeps whether it was asked for.
        """
        text = f"{function.text(self.norm)}({self.name})"
        if wanted:
            text = f"({text} if {wanted} else {self.name})"
        return text if self.turn is None else f"{text}.transpose(1, 2)"

    def removed(self, function: Function) -> list[Edit]:
        """Edits after which the name holds the heads as they are given to the norm."""
        heads = self.call.args[0]
        if self.turn is None:
            return replace(function, self.call, "(", heads, ")")
        turned = self.turn.func.value  # type: ignore[attr-defined]
        if turned is self.call:
            return replace(function, self.turn, "(", heads, ")")
        return [
            *replace(function, self.call, "(", heads, ")"),
            *replace(function, self.turn, turned),
        ]


class Guard(NamedTuple):
    """An ``if``, the statements that it stands among, and where."""

    statement: ast.If
    block: list[ast.stmt]
    place: int


def guarded(function: Function, block: list[ast.stmt]) -> Guard | None:
    """The ``if`` under which a block of statements runs where its condition holds."""
    for around in function.blocks:
        for place, statement in enumerate(around):
            if isinstance(statement, ast.If) and statement.body is block:
                return Guard(statement, around, place)
    return None


def normed(function: Function, name: str, block: list[ast.stmt], place: int) -> Normed | str | None:
    """Where a name gets the normalised heads that it holds at a place of a block.

    Or why its norm cannot be computed there instead; None where the block gives it no value.
    """
    if function.shared(name) is not None:
        return f"{name} is no name of this function alone"
    turn: ast.Call | None = None
    for at in range(place - 1, -1, -1):
        statement = block[at]
        to, value = assigned(statement)
        if to == name:
            inner, outer = _unturned(value)
            if outer is not None and turn is not None:
                return f"{name} is transposed twice"
            turn = outer or turn
            if (call := _norm(inner)) is not None:
                return Normed(name, call, turn)
            if outer is not None and isinstance(inner, ast.Name) and inner.id == name:
                continue
            return _why_no_norm(name, statement, block[:at])
        if isinstance(statement, ast.If) and (call := _norm_under(statement, name)) is not None:
            return Normed(name, call, turn, statement)
        if reason := why_not_past(name, statement):
            return reason
    if turn is not None:
        return f"{name} is transposed, and no norm of it stands before"
    return None


def _unturned(value: ast.expr) -> tuple[ast.expr, ast.Call | None]:
    """(x, the call) of ``x.transpose(1, 2)``, or (the value, None)."""
    match value:
        case ast.Call(
            func=ast.Attribute(value=inner, attr=turn),
            args=[ast.Constant(value=first), ast.Constant(value=second)],
            keywords=[],
        ) if turn == "transpose" and (first, second) in ((1, 2), (2, 1)):
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
    for one in statement.body:
        to, value = assigned(one)
        call = _norm(value) if to else None
        if call is None or to in found:
            return None
        heads = call.args[0]
        if not isinstance(heads, ast.Name) or heads.id != to:
            return None
        found[to] = call
    return None if statement.orelse else found.get(name)


def _why_no_norm(name: str, statement: ast.stmt, before: list[ast.stmt]) -> str:
    _, value = assigned(statement)
    reads = {node.id for node in ast.walk(value) if isinstance(node, ast.Name)}
    given = [value for to, value in map(assigned, before) if to == name]
    if name in reads and any(_norm(_unturned(one)[0]) is not None for one in given):
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
