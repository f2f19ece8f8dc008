"""How many arguments a kernel takes: one that somebody else wrote may not know the newest."""

from __future__ import annotations

import inspect
from collections.abc import Callable


def takes(function: Callable[..., object], count: int) -> bool:
    """Whether a function can be called with so many positional arguments, as far as it says."""
    try:
        inspect.signature(function).bind(*range(count))
    except TypeError:
        return False
    except ValueError:  # it has no signature that can be read
        return True
    return True


def names(function: Callable[..., object], parameter: str) -> bool:
    """Whether a function has a parameter of that name."""
    try:
        return parameter in inspect.signature(function).parameters
    except ValueError:
        return False
