"""Calls of torch's functions, handed to somebody else while a token runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

#: (the function, its arguments) -> what the call gives.
Handler = Callable[..., Any]


def listening(handlers: Mapping[Any, Handler]) -> AbstractContextManager[object]:
    """In this thread, calls of these functions go to their handlers, all others run as ever."""
    from torch.overrides import TorchFunctionMode

    class Mode(TorchFunctionMode):
        def __torch_function__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            handler = handlers.get(function)
            if handler is None:
                return function(*args, **(kwargs or {}))
            return handler(function, *args, **(kwargs or {}))

    return Mode()
