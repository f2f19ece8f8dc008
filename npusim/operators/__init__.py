"""References on the CPU for the wheel's operators, one module a family, with their limits.

A reference takes the schema's arguments by name, as CPU tensors, and returns CPU tensors. Arguments
that its signature leaves out have to be the schema's defaults.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any, NamedTuple

from .limit import Limit, limits_of


class Operator(NamedTuple):
    """``reference`` computes; ``limits`` sees the same arguments as they came, and may refuse."""

    reference: Callable[..., Any]
    limits: Callable[..., None] | None


_OPERATORS: dict[str, Operator] = {}
_LIMITS: list[Limit] = []


def operator(name: str, limits: Callable[..., None] | None = None) -> Callable[..., Any]:
    """Registers the decorated function as the reference of ``npu::name``."""

    def register(reference: Callable[..., Any]) -> Callable[..., Any]:
        _OPERATORS[name] = Operator(reference, limits)
        return reference

    return register


def operators() -> dict[str, Operator]:
    """Operator name (with ".overload" where it has one) -> its reference and limits."""
    _load()
    return dict(_OPERATORS)


def limits() -> list[Limit]:
    """Every limit that some operator here enforces."""
    _load()
    return list(_LIMITS)


def _load() -> None:
    if not _LIMITS:
        for module in pkgutil.iter_modules(__path__):
            _LIMITS.extend(limits_of(importlib.import_module(f"{__name__}.{module.name}")))
