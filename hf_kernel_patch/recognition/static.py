"""A module's functions and classes made of its source alone, to look at them without running it."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import CellType, CodeType, FunctionType
from typing import Any


def scope_of(file: Path, module: str) -> dict[str, Any]:
    """What stands for the globals of a module: every function and class that its file defines.

    The functions have their own code, without decorators and defaults, and must not be called.
    Raises OSError, SyntaxError or ValueError for a file that cannot be read or is no Python.
    """
    code = compile(file.read_bytes(), str(file), "exec", dont_inherit=True)
    scope: dict[str, object] = {"__name__": module, **_imported()}
    for name, inner in _defined(code):
        scope[name] = _function(inner, scope) if _is_function(inner) else _class(inner, scope)
    return scope


def _defined(code: CodeType) -> list[tuple[str, CodeType]]:
    """The functions and classes that a module's or a class's body defines."""
    inner = [one for one in code.co_consts if isinstance(one, CodeType)]
    return [(one.co_name, one) for one in inner if one.co_name.isidentifier()]


def _is_function(code: CodeType) -> bool:
    return bool(code.co_flags & inspect.CO_OPTIMIZED)


def _function(code: CodeType, scope: dict[str, object]) -> FunctionType:
    cells = tuple(CellType() for _ in code.co_freevars)
    return FunctionType(code, scope, code.co_name, None, cells)


def _class(body: CodeType, scope: dict[str, object]) -> type:
    from torch import nn

    members: dict[str, Any] = {
        name: _function(code, scope)
        for name, code in _defined(body)
        if _is_function(code) and name != "__annotate__"
    }
    members |= {"__module__": scope["__name__"], "__qualname__": body.co_name}
    if "logits" in body.co_names:  # a field of an output
        members["__dataclass_fields__"] = {"logits": None}
    return type(body.co_name, (nn.Module,), members)


def _imported() -> dict[str, Any]:
    """What modules import and rules ask for: PyTorch, and the outputs of models."""
    import torch
    from transformers import modeling_outputs

    outputs = {k: v for k, v in vars(modeling_outputs).items() if "Output" in k}
    return {**outputs, "torch": torch, "nn": torch.nn, "F": torch.nn.functional}
