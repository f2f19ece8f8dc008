"""The wrappers around a function, rebuilt around another one."""

from __future__ import annotations

from types import CellType, FunctionType
from typing import Any

from hf_kernel_patch.recognition.edits import CannotRewrite
from hf_kernel_patch.recognition.rewriting import like
from hf_kernel_patch.recognition.source import original_of


def innermost_of(value: Any) -> Any:
    """The function under all wrappers that say what they wrap."""
    while hasattr(value := original_of(value), "__wrapped__"):
        value = value.__wrapped__
    return value


def rewrapped(value: object, inner: FunctionType, new: FunctionType) -> Any:
    """``value``, a wrapper around ``inner`` or around such a wrapper, around ``new`` instead.

    All of its cells are shared but those that hold what it wraps, or itself. Raises CannotRewrite
    for a wrapper that is no function with what it wraps in one of its cells.
    """
    if value is inner:
        return new
    if not isinstance(value, FunctionType):
        raise CannotRewrite(f"a {type(value).__qualname__} wraps it in an unknown way")
    if not hasattr(value, "__wrapped__"):
        raise CannotRewrite(f"{_name(value)} wraps it in an unknown way")
    below = value.__wrapped__
    wrapped = rewrapped(original_of(below), inner, new)
    cells: list[CellType] = []
    found, itself = False, CellType()
    for cell in value.__closure__ or ():
        held = _contents(cell)
        found = found or held is below
        own = original_of(held) is value  # what was made of it may stand in its cell meanwhile
        if _keeps(held, below) and not own:
            raise CannotRewrite(f"{_name(value)} wraps it in an unknown way")
        cells.append(itself if own else CellType(wrapped) if held is below else cell)
    if not found:
        raise CannotRewrite(f"{_name(value)} wraps it in an unknown way")
    made = FunctionType(
        value.__code__, value.__globals__, value.__name__, value.__defaults__, tuple(cells)
    )
    like(made, value)
    made.__dict__.pop("__hf_kernel_patch__", None)
    made.__wrapped__ = wrapped  # type: ignore[attr-defined]
    itself.cell_contents = made
    return made


def cells_of_itself(function: object) -> list[CellType]:
    """Where a function holds itself, or what was made of it and stands in its place.

    transformers' layers ask whether the class's forward is still the one that runs, and only then
    recompute their activations.
    """
    cells = getattr(function, "__closure__", None) or ()
    return [
        cell
        for cell in cells
        if (held := _contents(cell)) is function or original_of(held) is function
    ]


def _contents(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return None


def _keeps(held: object, below: object) -> bool:
    """Whether a value holds the wrapped function itself, and would go on calling it."""
    if isinstance(held, (list, tuple, set, frozenset)):
        return any(one is below for one in held)
    if isinstance(held, dict):
        return any(one is below for one in held.values())
    if isinstance(held, FunctionType):
        inside = [_contents(cell) for cell in held.__closure__ or ()]
        defaults = [*(held.__defaults__ or ()), *(held.__kwdefaults__ or {}).values()]
        return held is not below and any(one is below for one in [*inside, *defaults])
    return getattr(held, "func", None) is below or getattr(held, "__func__", None) is below


def _name(value: object) -> str:
    return f"{getattr(value, '__qualname__', type(value).__qualname__)} of {value.__module__}"
