"""Recognising a piece of source: is the code in force the code a replacement was written for?"""

from __future__ import annotations

import ast
import copy
import inspect
import textwrap
from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any

from hf_kernel_patch.recognition.function import NoSource, function_of


@cache
def canonical(source: str) -> str:
    """One function's source without decorators, docstring, annotations and local names.

    Parameters keep their names, since callers may use them; so do globals and attributes, which
    say what the code calls. The text is the running Python's ``ast.unparse``, so two sources
    are comparable in one process whatever Python they were written for.
    """
    function = ast.parse(textwrap.dedent(source)).body[0]
    if not isinstance(function, ast.FunctionDef):
        raise ValueError(f"not the source of one function: {source[:60]!r}")
    return _canonical(function)


def _canonical(function: ast.FunctionDef) -> str:
    function.decorator_list, function.returns, function.name = [], None, "function"
    first = function.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
        function.body = function.body[1:] or [ast.Pass()]
    names = {
        node.id: ""
        for node in ast.walk(function)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }
    arguments = {node.arg for node in ast.walk(function) if isinstance(node, ast.arg)}
    locals_ = {n: f"local{i}" for i, n in enumerate(k for k in names if k not in arguments)}
    return ast.unparse(ast.fix_missing_locations(_Normalise(locals_).visit(function)))


class _Normalise(ast.NodeTransformer):
    def __init__(self, names: dict[str, str]):
        self.names = names

    def visit_Name(self, node: ast.Name) -> ast.Name:
        node.id = self.names.get(node.id, node.id)
        return node

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        self.generic_visit(node)
        if node.value is None:
            return node
        return ast.Assign(targets=[node.target], value=node.value)


@cache
def fingerprint(function: FunctionType) -> str | None:
    """The canonical source of a live function, or None where its source cannot be had."""
    try:
        return _canonical(copy.deepcopy(function_of(function).node))
    except NoSource:
        return None


#: In the namespace of a class that one model's patch has made: the class that it derives from.
ROOT = "__hf_kernel_patch_root__"


def made_by_us(value: object) -> Any:
    """The Composed whose function a value is, or None; a wrapper that copied its name is not it."""
    made = getattr(value, "__hf_kernel_patch__", None)
    return made if made is not None and made.function is value else None


def original_of(value: object) -> Any:
    """What stood there before a replacement of ours."""
    while (made := made_by_us(value)) is not None:
        value = made.original
    return value


def innermost(value: Any) -> Callable[..., Any]:
    """The function under the wrappers that transformers and ``kernels`` put around their code.

    Only wrappers of those packages, and ``contextlib``'s, are looked through: under anybody else's
    there is a behaviour that a replacement would drop.
    """
    while True:
        if (made := made_by_us(value)) is not None:
            value = made.original
        elif hasattr(value, "__wrapped__") and (
            _belongs_to(value, "transformers") or _belongs_to(value, "contextlib")
        ):
            value = value.__wrapped__
        elif (inner := _kernels_func(value)) is not None:
            value = inner
        else:
            return value


def _belongs_to(value: object, package: str) -> bool:
    module = getattr(value, "__globals__", {}).get("__name__", "")
    return module == package or module.startswith(f"{package}.")


def _kernels_func(value: object) -> Any:
    """The function inside the module object that ``kernels`` makes of a decorated function."""
    kind: Any = type(value)
    if kind.__module__ != "kernels.layer.layer":
        return None
    # kernelize binds the class's own forward when it finds no kernel.
    own = vars(value).get("forward")
    if own is not None and getattr(own, "__func__", None) is not kind.forward:
        return None
    return inspect.getclosurevars(kind.forward).nonlocals.get("func")
