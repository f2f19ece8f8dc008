"""Of which classes a module's norms are, as far as its ``__init__`` says.

A rule finds its sites by the names of the norms. Whether an op can serve a norm is decided at the
call. Where the ``__init__`` makes it an ``nn.LayerNorm``, that is known before: the report can then
say so, and no site is patched that would never be served.
"""

from __future__ import annotations

import ast
import inspect
import sys

from hf_kernel_patch.recognition.function import Function, NoSource, function_of
from hf_kernel_patch.recognition.known import why_foreign
from hf_kernel_patch.recognition.leaves.norms import norm_of
from hf_kernel_patch.recognition.source import innermost

#: Modules whose classes this module trusts; others may hold norms that somebody has patched.
_HOMES = ("torch.nn.", "transformers.")
_IMPORTED = {"nn": "torch.nn", "torch": "torch"}


def why_no_norm(function: Function, norm: ast.Attribute) -> str:
    """Why ``self.norm``, as this method has it, is no norm that an op can serve, or "".

    "" too where its class is not known here: then that is decided at the call.
    """
    written = ""
    for init, value in _values(function, norm.attr):
        for made in _alternatives(value):
            if isinstance(made, ast.Constant) and made.value is None:
                continue
            if not isinstance(made, ast.Call):
                return ""
            cls = _class_of(init, made.func)
            if cls is None or not _is_no_norm(cls, function):
                return ""
            written = ast.unparse(made.func)
    return f"the norm is a {written}, which is not a norm of a known leaf" if written else ""


def _values(function: Function, name: str) -> list[tuple[Function, ast.expr]]:
    """(the ``__init__``, what it gives ``self.name``), of the first class that does."""
    cls = function.value.__globals__.get(function.class_name)
    for base in cls.__mro__ if isinstance(cls, type) else ():
        if base.__module__.startswith("torch."):
            break
        init = innermost(vars(base).get("__init__"))
        if not inspect.isfunction(init):
            continue
        try:
            source = function_of(init)
        except NoSource:
            break
        if found := [(source, value) for value in _given(source.node, name)]:
            return found
    return []


def _given(init: ast.FunctionDef, name: str) -> list[ast.expr]:
    """Every value that an ``__init__`` gives an attribute of its own."""
    attributes = {
        node
        for node in ast.walk(init)
        if isinstance(node, ast.Attribute) and node.attr == name and isinstance(node.ctx, ast.Store)
        if isinstance(node.value, ast.Name) and node.value.id == "self"
    }
    found: list[ast.expr] = []
    for node in ast.walk(init):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        value = getattr(node, "value", None)
        alone = attributes.intersection(targets)
        if alone and value is not None:
            found.append(value)
            attributes -= alone
    # What is left is one of several targets, or of a loop: it may be anything.
    return [*found, *attributes]


def _alternatives(value: ast.expr) -> list[ast.expr]:
    if isinstance(value, ast.IfExp):
        return [*_alternatives(value.body), *_alternatives(value.orelse)]
    return [value]


def _class_of(init: Function, called: ast.expr) -> type | None:
    """The class that ``nn.LayerNorm`` or a name alone stands for in an ``__init__``, if any."""
    path: list[str] = []
    while isinstance(called, ast.Attribute):
        path.insert(0, called.attr)
        called = called.value
    if not isinstance(called, ast.Name) or init.stores(called.id):
        return None
    found: object = init.value.__globals__.get(called.id)
    if found is None and called.id in init.imported:  # a module that was read and not run
        found = sys.modules.get(_IMPORTED.get(called.id, ""))
    for name in path:
        found = getattr(found, name, None)
    return found if isinstance(found, type) else None


def _is_no_norm(cls: type, function: Function) -> bool:
    """Whether a class is no norm of a known leaf, by its own code, which is not patched."""
    home = cls.__module__
    if not home.startswith(_HOMES) and home != function.value.__module__:
        return False
    methods = [getattr(cls, name, None) for name in ("forward", "_norm")]
    if any(why_foreign(innermost(m), cls) for m in methods if m is not None):
        return False
    return norm_of(cls) is None
