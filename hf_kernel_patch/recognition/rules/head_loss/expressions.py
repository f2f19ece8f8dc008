"""What is done to logits in one expression, and which expressions do nothing else."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from types import EllipsisType
from typing import TypeGuard

from hf_kernel_patch.recognition.function import Function, changes

#: Attributes that logits have before they are computed.
META = ("device", "dtype", "ndim", "shape")
#: Methods that leave a tensor as it is.
_OF_TENSORS = (
    "clone",
    "contiguous",
    "dim",
    "flatten",
    "float",
    "long",
    "reshape",
    "size",
    "to",
    "view",
)
#: Methods of a model or a config that change nothing.
_OF_MODELS = "get_decoder", "get_text_config"
_METHODS = (*_OF_TENSORS, *_OF_MODELS)
#: Builtin functions that change nothing.
_BUILTINS = ("getattr", "hasattr", "isinstance", "len")


def chain(
    function: Function, value: ast.expr, is_base: Callable[[ast.expr], bool]
) -> tuple[ast.expr, list[str]] | None:
    """The base of an expression and the steps that follow it, as arguments of the helper.

    ``("/", self.scale)`` for a division, ``("tanh",)``, ``("float",)``; None for anything else.
    """
    import torch

    if is_base(value):
        return value, []
    match value:
        case ast.Call(
            func=ast.Attribute(value=inner, attr="float" | "contiguous" | "tanh" as method),
            args=[],
            keywords=[],
        ):
            step = f'("{method}",)'
        case ast.Call(func=ast.Attribute(value=inner, attr="to"), args=[dtype], keywords=[]) if (
            _found(function, dtype) is torch.float32
        ):
            step = '("float",)'
        case ast.Call(func=called, args=[inner], keywords=[]) if _is_tanh(function, called):
            step = '("tanh",)'
        case ast.Call(
            func=ast.Attribute(value=ast.Name("self"), attr=name) as called,
            args=[inner],
            keywords=[],
        ) if "cap" in name:
            step = f'("module", {ast.unparse(called)})'
        case ast.BinOp(left=inner, op=ast.Mult() | ast.Div() as op, right=by) if _reads(by):
            step = f'("{"/" if isinstance(op, ast.Div) else "*"}", {ast.unparse(by)})'
        case ast.BinOp(left=by, op=ast.Mult(), right=inner) if _reads(by):
            step = f'("*", {ast.unparse(by)})'
        case ast.Subscript(
            value=inner,
            slice=ast.Tuple(
                elts=[
                    ast.Constant(value=EllipsisType()),
                    ast.Slice(lower=None, upper=ast.expr() as by, step=None),
                ]
            ),
        ) if _reads(by):
            step = f'("first", {ast.unparse(by)})'
        case _:
            return None
    found = chain(function, inner, is_base)
    return None if found is None else (found[0], [*found[1], step])


def _is_tanh(function: Function, called: ast.expr) -> bool:
    import torch

    return _found(function, called) in (torch.tanh, torch.nn.functional.tanh)


def _found(function: Function, node: ast.expr) -> object:
    """What a name with dots means in a function's module; None for anything of the function."""
    path: list[str] = []
    while isinstance(node, ast.Attribute):
        path.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name) or function.stores(node.id):
        return None
    found: object = function.value.__globals__.get(node.id)
    for name in reversed(path):
        found = getattr(found, name, None)
    return found


_VALUES = ast.Name, ast.Attribute, ast.Constant, ast.BinOp, ast.UnaryOp
#: Nodes of the tree that are parts of those values, and no values themselves.
_MARKS = ast.expr_context, ast.operator, ast.unaryop
_READING = (*_VALUES, *_MARKS)


def _reads(node: ast.expr) -> bool:
    """Whether an expression is made of names, attributes, numbers and arithmetic alone."""
    return all(isinstance(inner, _READING) for inner in ast.walk(node))


def is_quiet(function: Function, node: ast.AST) -> bool:
    """Whether an expression or statement leaves tensors as they are, as far as it shows.

    It may read what is there, ask a config, make a view or a copy of a tensor, or take something
    out of the function's own keyword arguments.
    """
    return not any(_is_loud(function, inner) for inner in ast.walk(node))


def _is_loud(function: Function, node: ast.AST) -> bool:
    """Whether a node itself may change a tensor, whatever its parts do."""
    match node:
        case ast.Call(func=ast.Name(id=name)):
            return name not in _BUILTINS or bool(function.stores(name))
        case ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr="pop" | "get")):
            given = function.node.args.kwarg
            return given is None or name != given.arg
        case ast.Call(func=ast.Attribute(attr=name)):
            return name not in _METHODS or changes(node)
        case ast.Call() | ast.Await() | ast.Yield() | ast.YieldFrom() | ast.Lambda():
            return True
    return changes(node)


def head_call(node: ast.expr) -> bool:
    """Whether an expression calls an attribute of ``self``, or one of those in a list."""
    if not isinstance(node, ast.Call):
        return False
    called = node.func
    if isinstance(called, ast.Subscript) and _reads(called.slice):
        called = called.value
    while isinstance(called, ast.Attribute):
        called = called.value
        if is_name(called, "self"):
            return True
    return False


def is_name(node: ast.AST | None, name: str) -> TypeGuard[ast.Name]:
    """Whether an expression is this name."""
    return isinstance(node, ast.Name) and node.id == name


def own_calls(function: Function, method: str) -> Iterator[ast.Call]:
    """Every call ``self.method(...)`` in a function."""
    for node in ast.walk(function.node):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id="self"), attr=name)) as call:
                if name == method:
                    yield call


def argument(call: ast.Call, index: int, name: str) -> ast.expr | None:
    """What a call gives for a parameter, by position or by name."""
    if len(call.args) > index:
        return call.args[index]
    return next((keyword.value for keyword in call.keywords if keyword.arg == name), None)


def parameters(function: Function) -> set[str]:
    """The names of a function's parameters."""
    given = function.node.args
    return {parameter.arg for parameter in (*given.posonlyargs, *given.args, *given.kwonlyargs)}
