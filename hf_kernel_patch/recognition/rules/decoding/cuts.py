"""Where a decoder layer and its attention are cut."""

from __future__ import annotations

import ast
import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

from hf_kernel_patch.recognition.function import Function
from hf_kernel_patch.recognition.segments import (
    CannotCut,
    Segment,
    body_of,
    cut,
    parameters_of,
    reads,
    stores,
)


def free(function: Function, name: str) -> str:
    """A name like this that the function does not use."""
    while name in function.names:
        name += "_"
    return name


# -- the layer


def _result(function: Function, value: ast.expr, place: int = 0) -> tuple[ast.stmt, ast.Name]:
    """``name = value`` and the name."""
    name = free(function, f"value_{place}")
    target = ast.copy_location(ast.Name(name, ast.Store()), value)
    statement = ast.copy_location(ast.Assign([target], value), value)
    return statement, ast.copy_location(ast.Name(name, ast.Load()), value)


class Call(NamedTuple):
    """A layer's call of its attention, and where its results go."""

    place: int
    name: str
    value: ast.Call
    targets: list[str]
    statement: ast.stmt
    before: tuple[ast.stmt, ...] = ()

    def with_arguments_named(self, function: Function) -> Call:
        """With what it computes for the call's sake given names before."""
        before: list[ast.stmt] = []
        call = copy.copy(self.value)

        def named(value: ast.expr) -> ast.expr:
            if not any(isinstance(n, (ast.Call, ast.BinOp)) for n in ast.walk(value)):
                return value
            statement, name = _result(function, value, len(before))
            before.append(statement)
            return name

        call.args = [named(value) for value in call.args]
        call.keywords = [
            ast.copy_location(ast.keyword(k.arg, named(k.value)), k) for k in call.keywords
        ]
        target = self.statement.targets  # type: ignore[attr-defined]
        statement = ast.copy_location(ast.Assign(target, call), self.statement)
        return self._replace(value=call, statement=statement, before=tuple(before))

    def handed_over(
        self, function: Function, attention: Function, computed: set[str]
    ) -> tuple[ast.Call, dict[str, str]]:
        """The call without what the layer computes, and {the attention's name: the layer's}."""
        call, linked = copy.copy(self.value), dict[str, str]()
        given = attention.node.args
        by_place = [one.arg for one in (*given.posonlyargs, *given.args)][1:]
        by_name = {one.arg for one in (*given.args, *given.kwonlyargs)}

        def linking(to: str | None, value: ast.expr) -> ast.expr:
            if not reads(value) & computed:
                return value
            if to is None or not isinstance(value, ast.Name):
                raise CannotCut(f"its attention gets {ast.unparse(value)}, which it computes")
            linked[to] = value.id
            return ast.copy_location(ast.Constant(None), value)

        call.args = [
            linking(by_place[place] if place < len(by_place) else None, value)
            for place, value in enumerate(call.args)
        ]
        call.keywords = [
            ast.copy_location(
                ast.keyword(k.arg, linking(k.arg if k.arg in by_name else None, k.value)), k
            )
            for k in call.keywords
        ]
        return call, linked


def call_in(function: Function, body: Sequence[ast.stmt]) -> Call:
    """The one call of a module of its own that gets position embeddings."""
    found = [
        (place, node)
        for place, statement in enumerate(body)
        for node in ast.walk(statement)
        if isinstance(node, ast.Call)
        and _own(node)
        and any(k.arg == "position_embeddings" for k in node.keywords)
    ]
    if len(found) != 1:
        raise CannotCut(f"{len(found)} modules of it get position_embeddings")
    place, call = found[0]
    statement = body[place]
    if not isinstance(statement, ast.Assign) or statement.value is not call:
        raise CannotCut(f"line {call.lineno}: its attention is called inside of other code")
    target = statement.targets[0]
    targets = target.elts if isinstance(target, ast.Tuple) else [target]
    if len(statement.targets) > 1 or not all(isinstance(one, ast.Name) for one in targets):
        raise CannotCut(f"line {call.lineno}: its attention's results go elsewhere than to names")
    names = [one.id for one in targets if isinstance(one, ast.Name)]
    return Call(place, _own(call), call, names, statement)


def _own(call: ast.Call) -> str:
    """The name of the module of its own that a method calls, or ""."""
    func = call.func
    if isinstance(func, ast.Attribute) and isinstance(func.value, ast.Name):
        return func.attr if func.value.id == "self" else ""
    return ""


def with_result(function: Function, body: list[ast.stmt]) -> list[ast.stmt]:
    """With what the last statement computes and returns computed before."""
    last = body[-1]
    if not isinstance(last, ast.Return) or last.value is None:
        raise CannotCut("it does not end in its result")
    if not _computes(last):
        return body
    statement, name = _result(function, last.value)
    return [*body[:-1], statement, ast.copy_location(ast.Return(name), last)]


def _computes(node: ast.stmt) -> bool:
    if any(isinstance(n, (ast.Call, ast.BinOp)) for n in ast.walk(node)):
        return True
    sums = [n for n in ast.walk(node) if isinstance(n, ast.AugAssign)]
    return any(not isinstance(one.value, ast.Tuple) for one in sums)


def tail_of(body: Sequence[ast.stmt]) -> int:
    """Where the statements begin that only put the result together."""
    place = len(body)
    while not _computes(body[place - 1]):
        place -= 1
    return place


def mlp_of(layer: Any, attention: str, body: Sequence[ast.stmt], first: int) -> int:
    """Where a module is called that has modules of its own, as an MLP and experts do."""
    large = {name for name, child in layer.named_children() if any(True for _ in child.children())}
    large.discard(attention)
    for place in range(first, len(body)):
        calls = [n for n in ast.walk(body[place]) if isinstance(n, ast.Call)]
        if any(_own(call) in large for call in calls):
            return place
    return len(body)


# -- the attention


class Attention(NamedTuple):
    before: Segment
    middle: Segment
    after: Segment
    results: dict[str, str]


def attention_of(function: Function, targets: Sequence[str]) -> Attention:
    """The parts of an attention, and {the layer's name: the attention's} of its results.

    ``targets`` are the layer's names for them, "" for one that is not used.
    """
    *body, last = body_of(function)
    if not isinstance(last, ast.Return) or last.value is None:
        raise CannotCut(f"{function.value.__qualname__} does not end in its result")
    values = last.value.elts if isinstance(last.value, ast.Tuple) else [last.value]
    if len(values) != len(targets):
        raise CannotCut(f"{function.value.__qualname__} gives {len(values)} results")
    results: dict[str, str] = {}
    for place, (target, value) in enumerate(zip(targets, values)):
        if not isinstance(value, ast.Name):
            statement, value = _result(function, value, place)
            body.append(statement)
        if target:
            results[target] = value.id
    interface = _interface(function, body)
    rotary = _rotary(function, body, interface)
    only_computes(body[:rotary], body[interface + 1 :])
    before, middle, after = cut(function, body, [rotary, interface + 1], results.values())
    return Attention(before, middle, after, results)


def only_computes(*parts: Sequence[ast.stmt]) -> None:
    """Raises CannotCut where statements leave something behind that no replay would."""
    for node in (n for part in parts for statement in part for n in ast.walk(statement)):
        if isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load):
            raise CannotCut(f"line {node.lineno}: it sets {ast.unparse(node)}")


def _interface(function: Function, body: Sequence[ast.stmt]) -> int:
    """The statement that calls the attention interface."""
    found = [place for place, statement in enumerate(body) if _interfaces(statement)]
    if len(found) != 1:
        raise CannotCut(f"{function.value.__qualname__} calls {len(found)} attention interfaces")
    return found[0]


def _interfaces(statement: ast.stmt) -> set[str]:
    return {
        node.func.id
        for node in ast.walk(statement)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and len(node.args) > 3
        and isinstance(node.args[0], ast.Name)
        and node.args[0].id == "self"
        and not any(isinstance(one, ast.Attribute) for one in node.args)
    }


def _rotary(function: Function, body: Sequence[ast.stmt], interface: int) -> int:
    """What follows the rotary function, and what is then done to the heads alone."""
    places = [
        place
        for place, statement in enumerate(body[:interface])
        if any(name.startswith("apply_") and "rotary" in name for name in reads(statement))
    ]
    if not places:
        raise CannotCut(f"{function.value.__qualname__} calls no rotary function")
    place = places[-1] + 1
    parameters, chosen = set(parameters_of(function)), _interfaces(body[interface])
    known = reads(*body[:place]) & parameters
    while place < interface:
        statement = body[place]
        others = reads(statement) & parameters - known
        if others or stores(statement) & chosen or _holds_dict(statement):
            break
        place += 1
    return place


def _holds_dict(statement: ast.stmt) -> bool:
    return any(isinstance(node, ast.Dict) for node in ast.walk(statement))
