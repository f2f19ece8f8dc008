"""Where a decoder layer and its attention are cut."""

from __future__ import annotations

import ast
import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

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

if TYPE_CHECKING:
    from torch import nn


def free(function: Function, name: str) -> str:
    """A name like this that the function does not use."""
    while name in function.names:
        name += "_"
    return name


# -- the layer


def _named(function: Function, value: ast.expr, number: int = 0) -> tuple[ast.stmt, ast.Name]:
    """A new statement ``name = value``, and the name as an expression."""
    name = free(function, f"value_{number}")
    target = ast.copy_location(ast.Name(name, ast.Store()), value)
    statement = ast.copy_location(ast.Assign([target], value), value)
    return statement, ast.copy_location(ast.Name(name, ast.Load()), value)


class Call(NamedTuple):
    """A layer's call of its attention.

    Attributes:
        at: the index of the statement among those of the layer's forward.
        name: the layer's attribute that is called.
        value: the call.
        targets: the names that get its results.
        statement: the assignment of the call.
        before: statements to run before, by which arguments get names.
    """

    at: int
    name: str
    value: ast.Call
    targets: list[str]
    statement: ast.Assign
    before: tuple[ast.stmt, ...] = ()

    def with_arguments_named(self, function: Function) -> Call:
        """The same with names for those arguments that the layer computes in the call."""
        before: list[ast.stmt] = []
        call = copy.copy(self.value)

        def named(value: ast.expr) -> ast.expr:
            if not any(isinstance(n, (ast.Call, ast.BinOp)) for n in ast.walk(value)):
                return value
            statement, name = _named(function, value, len(before))
            before.append(statement)
            return name

        call.args = [named(value) for value in call.args]
        call.keywords = [
            ast.copy_location(ast.keyword(k.arg, named(k.value)), k) for k in call.keywords
        ]
        assign = ast.Assign(self.statement.targets, call)
        statement = ast.copy_location(assign, self.statement)
        return self._replace(value=call, statement=statement, before=tuple(before))

    def without_computed(
        self, function: Function, attention: Function, computed: set[str]
    ) -> tuple[ast.Call, dict[str, str]]:
        """The call with None for what the layer computes, and {attention's name: layer's name}."""
        call, linked = copy.copy(self.value), dict[str, str]()
        given = attention.node.args
        positional = [parameter.arg for parameter in (*given.posonlyargs, *given.args)][1:]
        named = {parameter.arg for parameter in (*given.args, *given.kwonlyargs)}

        def linking(to: str | None, value: ast.expr) -> ast.expr:
            if not reads(value) & computed:
                return value
            if to is None or not isinstance(value, ast.Name):
                raise CannotCut(f"its attention gets {ast.unparse(value)}, which it computes")
            linked[to] = value.id
            return ast.copy_location(ast.Constant(None), value)

        call.args = [
            linking(positional[i] if i < len(positional) else None, value)
            for i, value in enumerate(call.args)
        ]
        call.keywords = [
            ast.copy_location(
                ast.keyword(k.arg, linking(k.arg if k.arg in named else None, k.value)), k
            )
            for k in call.keywords
        ]
        return call, linked


def call_in(function: Function, body: Sequence[ast.stmt]) -> Call:
    """The one call of a module of its own that gets position embeddings."""
    found = [
        (at, node)
        for at, statement in enumerate(body)
        for node in ast.walk(statement)
        if isinstance(node, ast.Call)
        and _own(node)
        and any(k.arg == "position_embeddings" for k in node.keywords)
    ]
    if len(found) != 1:
        raise CannotCut(f"{len(found)} modules of it get position_embeddings")
    at, call = found[0]
    statement = body[at]
    if not isinstance(statement, ast.Assign) or statement.value is not call:
        raise CannotCut(f"line {call.lineno}: its attention is called inside of other code")
    target = statement.targets[0]
    targets = target.elts if isinstance(target, ast.Tuple) else [target]
    if len(statement.targets) > 1 or not all(isinstance(t, ast.Name) for t in targets):
        raise CannotCut(f"line {call.lineno}: its attention's results go elsewhere than to names")
    names = [t.id for t in targets if isinstance(t, ast.Name)]
    return Call(at, _own(call), call, names, statement)


def _own(call: ast.Call) -> str:
    """The name of the module of its own that a method calls, or ""."""
    func = call.func
    if isinstance(func, ast.Attribute) and isinstance(func.value, ast.Name):
        return func.attr if func.value.id == "self" else ""
    return ""


def with_result(function: Function, body: list[ast.stmt]) -> list[ast.stmt]:
    """The statements, of which the last returns a name or names and computes nothing."""
    last = body[-1]
    if not isinstance(last, ast.Return) or last.value is None:
        raise CannotCut("it does not end in its result")
    if not _computes(last):
        return body
    statement, name = _named(function, last.value)
    return [*body[:-1], statement, ast.copy_location(ast.Return(name), last)]


def _computes(node: ast.stmt) -> bool:
    if any(isinstance(n, (ast.Call, ast.BinOp)) for n in ast.walk(node)):
        return True
    sums = [n for n in ast.walk(node) if isinstance(n, ast.AugAssign)]
    return any(not isinstance(node.value, ast.Tuple) for node in sums)


def tail_of(body: Sequence[ast.stmt]) -> int:
    """Where the statements begin that only put the result together."""
    index = len(body)
    while not _computes(body[index - 1]):
        index -= 1
    return index


def mlp_of(layer: nn.Module, attention: str, body: Sequence[ast.stmt], first: int) -> int:
    """Where a module is called that has modules of its own, as an MLP and experts do."""
    large = {name for name, child in layer.named_children() if any(True for _ in child.children())}
    large.discard(attention)
    for index in range(first, len(body)):
        calls = [n for n in ast.walk(body[index]) if isinstance(n, ast.Call)]
        if any(_own(call) in large for call in calls):
            return index
    return len(body)


# -- the attention


class Attention(NamedTuple):
    """An attention's forward in parts.

    Attributes:
        before: up to the rotated heads.
        middle: cache and attention interface.
        after: from there to the results.
        results: the layer's names for the results -> the attention's.
    """

    before: Segment
    middle: Segment
    after: Segment
    results: dict[str, str]


def attention_of(function: Function, targets: Sequence[str]) -> Attention:
    """The parts of an attention.

    ``targets`` are the layer's names for its results, "" for one that is not used.
    """
    *body, last = body_of(function)
    if not isinstance(last, ast.Return) or last.value is None:
        raise CannotCut(f"{function.value.__qualname__} does not end in its result")
    values = last.value.elts if isinstance(last.value, ast.Tuple) else [last.value]
    if len(values) != len(targets):
        raise CannotCut(f"{function.value.__qualname__} gives {len(values)} results")
    results: dict[str, str] = {}
    for number, (target, value) in enumerate(zip(targets, values)):
        if not isinstance(value, ast.Name):
            statement, value = _named(function, value, number)
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
    found = [index for index, stmt in enumerate(body) if _interfaces(stmt)]
    if len(found) != 1:
        raise CannotCut(f"{function.value.__qualname__} calls {len(found)} attention interfaces")
    return found[0]


def _interfaces(statement: ast.stmt) -> set[str]:
    """The functions that a statement calls as ``interface(self, query, key, value, ...)``."""
    return {
        node.func.id
        for node in ast.walk(statement)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and len(node.args) > 3
        and isinstance(node.args[0], ast.Name)
        and node.args[0].id == "self"
        and not any(isinstance(argument, ast.Attribute) for argument in node.args)
    }


def _rotary(function: Function, body: Sequence[ast.stmt], interface: int) -> int:
    """The index after the rotary function and the statements that only go on with the heads."""
    found = [
        index
        for index, statement in enumerate(body[:interface])
        if any(name.startswith("apply_") and "rotary" in name for name in reads(statement))
    ]
    if not found:
        raise CannotCut(f"{function.value.__qualname__} calls no rotary function")
    index = found[-1] + 1
    parameters, chosen = set(parameters_of(function)), _interfaces(body[interface])
    known = reads(*body[:index]) & parameters
    while index < interface:
        statement = body[index]
        others = reads(statement) & parameters - known
        if others or stores(statement) & chosen or _holds_dict(statement):
            break
        index += 1
    return index


def _holds_dict(statement: ast.stmt) -> bool:
    return any(isinstance(node, ast.Dict) for node in ast.walk(statement))
