"""Making the subclass that one module takes, and a copy of a forward over a scope of its own."""

from __future__ import annotations

import copy
import copyreg
import itertools
import sys
from types import CellType, FunctionType, ModuleType
from typing import Any

from hf_kernel_patch.patching.lookup import original_of
from hf_kernel_patch.recognition.source import innermost

_numbers = itertools.count(1)


def subclass(application: Any, base: type, name: str, method: Any, served: Any) -> Any:
    """A subclass of ``base`` under its own name whose method ``name`` is ours.

    A pickle loads as the original class, without this package; a copy stays patched.
    """
    root: Any = next(
        kind for kind in base.__mro__ if "__hf_kernel_patch_application__" not in vars(kind)
    )

    def reduce(self: Any, protocol: Any) -> Any:
        make, arguments, *rest = root.__reduce_ex__(self, protocol)
        if make is copyreg.__newobj__:  # type: ignore[attr-defined]
            # Pickle insists that the class it gets is the object's own; this way of making it not.
            make, arguments = copyreg._reconstructor, (type(self), object, None)  # type: ignore[attr-defined]
        return make, tuple(root if part is type(self) else part for part in arguments), *rest

    def twin(self: Any, memo: dict[int, Any] | None) -> Any:
        other = root.__new__(root)
        state = dict(vars(self))
        if memo is not None:
            memo[id(self)] = other
            state = copy.deepcopy(state, memo)
        other.__setstate__(state)
        for ours in reversed(type(self).__mro__):
            if "__hf_kernel_patch_application__" in vars(ours):
                vars(ours)["__hf_kernel_patch_application__"].adopt(other, ours)
        return other

    members = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__hf_kernel_patch_application__": application,
        "__hf_kernel_patch_served__": served,
        name: method,
        "__reduce_ex__": reduce,
    }
    if not hasattr(root, "__deepcopy__"):
        members["__deepcopy__"] = twin
        members["__copy__"] = lambda self: twin(self, None)
    kind: Any = type(base)(base.__name__, (base,), members)
    setattr(kind, name, method)  # transformers may have wrapped it once more
    return kind


def refers_to(module: Any, name: str, value: Any) -> bool:
    """Whether the module's forward calls the function by that global name."""
    function = innermost(getattr(type(module), "forward", None))
    return (
        isinstance(function, FunctionType)
        and name in function.__code__.co_names
        and original_of(function.__globals__.get(name)) is original_of(value)
    )


def rebound(forward: Any, name: str, value: Any) -> Any:
    """A copy of ``forward``, wrappers included, whose global ``name`` is ``value``.

    Or the reason why it cannot be copied. The scope is a module in ``sys.modules`` under a name
    of its own, since torch.compile looks globals up there.
    """
    if (inner := getattr(forward, "__wrapped__", None)) is not None:
        copied = rebound(inner, name, value)
        if isinstance(copied, str):
            return copied
        cells = [
            CellType(copied) if cell.cell_contents is inner else cell
            for cell in forward.__closure__ or ()
        ]
        if not any(cell.cell_contents is copied for cell in cells):
            return f"{forward.__qualname__} is wrapped in a way that cannot be copied"
        made = _copy(forward, forward.__globals__, tuple(cells))
        made.__wrapped__ = copied
        return made
    scope = ModuleType(f"{forward.__globals__['__name__']}.__hf_kernel_patch_{next(_numbers)}__")
    scope.__dict__.update(
        {k: v for k, v in forward.__globals__.items() if k not in ("__name__", "__spec__")}
    )
    scope.__dict__[name] = value
    sys.modules[scope.__name__] = scope
    return _copy(forward, scope.__dict__, forward.__closure__)


def _copy(function: Any, scope: dict[str, Any], cells: tuple[CellType, ...] | None) -> Any:
    made = FunctionType(function.__code__, scope, function.__name__, function.__defaults__, cells)
    made.__kwdefaults__ = function.__kwdefaults__
    made.__dict__.update(function.__dict__)
    made.__module__, made.__qualname__ = function.__module__, function.__qualname__
    made.__doc__, made.__annotations__ = function.__doc__, function.__annotations__
    made.__hf_kernel_patch_copy__ = (made, function)  # type: ignore[attr-defined]
    return made


def forget_scope(function: Any) -> None:
    """Take the scope that ``rebound`` made for a function out of ``sys.modules``."""
    name = innermost(function).__globals__.get("__name__", "")
    if "__hf_kernel_patch_" in name:
        sys.modules.pop(name, None)
