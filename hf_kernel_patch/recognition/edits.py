"""Edits of a function's text, which keep its lines where they are."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any, NamedTuple

from hf_kernel_patch.recognition.function import Function

Part = str | ast.AST


class CannotRewrite(Exception):
    """Why a function cannot be written anew."""


class Edit(NamedTuple):
    """From one (line, column in bytes) to another, this text.

    ``order`` tells apart what several edits add at one place.
    """

    start: tuple[int, int]
    end: tuple[int, int]
    text: str
    order: tuple[int, ...] = ()


def start(node: ast.AST) -> tuple[int, int]:
    """Where a part, which is no operator or the like, begins."""
    return node.lineno, node.col_offset  # type: ignore[attr-defined]


def end(node: ast.AST) -> tuple[int, int]:
    """Where a part ends."""
    return node.end_lineno, node.end_col_offset  # type: ignore[attr-defined]


def replace(function: Function, node: ast.AST, *parts: Part) -> list[Edit]:
    """Edits that make ``parts`` of a node: texts, and parts of the node that stay as they are.

    The parts that stay come in the order of the source. The text around them keeps the line breaks
    of what stood there, so that no line moves.
    """
    edits: list[Edit] = []
    place, text = start(node), ""
    for part in parts:
        if isinstance(part, str):
            text += part
            continue
        if start(part) < place:
            raise CannotRewrite("its parts come in another order than expected")
        breaks = "\n" * (start(part)[0] - place[0] - text.count("\n"))
        # Where two nodes begin, what stands before the larger one comes first.
        order = () if edits else (1, *(-one for one in end(node)))
        edits.append(Edit(place, start(part), text + breaks, order))
        place, text = end(part), ""
    breaks = "\n" * (end(node)[0] - place[0] - text.count("\n"))
    if not edits:
        return [Edit(place, end(node), f"({text}{breaks})" if breaks else text)]
    # What follows on its last line has to follow on the text, so the breaks come before; where two
    # nodes end, what stands after the smaller one comes first.
    order = (0, *(-one for one in start(node)))
    return [*edits, Edit(place, end(node), breaks + text, order)]


def insert(place: tuple[int, int], text: str) -> Edit:
    """An edit that adds a text."""
    return Edit(place, place, text)


def edited(function: Function, edits: Sequence[Edit]) -> list[str]:
    """The lines of the function's file with the edits made; as many as before."""
    lines = [line.encode() for line in function.lines]
    count = len(lines)
    following = (count + 1, 0)
    for edit in sorted(edits, key=lambda one: (one.start, one.end, one.order), reverse=True):
        if edit.end > following:
            raise CannotRewrite(f"line {edit.start[0]}: two changes of one place")
        following = edit.start
        (row, column), (last_row, last_column) = edit.start, edit.end
        text = lines[row - 1][:column] + edit.text.encode() + lines[last_row - 1][last_column:]
        lines[row - 1 : last_row] = text.splitlines(keepends=True)
    if len(lines) != count:
        raise CannotRewrite("its lines would move")
    made = [line.decode() for line in lines]
    if edits:
        tree_of(function, made)
    return made


def tree_of(function: Function, lines: list[str]) -> ast.FunctionDef:
    """The syntax tree of the function in a text of its file, without what runs before its call."""
    first, last = function.first_line, function.node.end_lineno or 0
    indented = lines[first - 1][:1].isspace()
    head = "\n" * (first - 2) + "if True:\n" if indented else "\n" * (first - 1)
    try:
        tree = ast.parse(head + "".join(lines[first - 1 : last]))
    except SyntaxError as error:
        raise CannotRewrite(f"line {error.lineno}: its text would be no Python") from None
    node: Any = tree.body[0].body[0] if indented else tree.body[0]  # type: ignore[attr-defined]
    if not isinstance(node, ast.FunctionDef):
        raise CannotRewrite("it is no function with lines of its own")
    given = node.args
    for one in [n for n in ast.walk(given) if isinstance(n, ast.arg)]:
        one.annotation = None
    node.returns = None
    # They have code of their own (a lambda); its first line is that of its first decorator.
    node.decorator_list = [_nothing(one) for one in node.decorator_list]
    given.defaults = [_nothing(one) for one in given.defaults]
    given.kw_defaults = [one and _nothing(one) for one in given.kw_defaults]
    return node


def _nothing(node: ast.expr) -> ast.expr:
    return ast.copy_location(ast.Constant(None), node)
