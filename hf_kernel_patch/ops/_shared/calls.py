"""In place of graphs on devices without: what was captured is called again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

#: A replay runs the function's code.
CODE_RUNS = True


class Graph(NamedTuple):
    """A function that is called at each replay."""

    replay: Callable[[], Any]


def capture(function: Callable[[], Any]) -> Graph:
    """Run a function once; raises what it raises."""
    function()
    return Graph(function)


def stream() -> int:
    """There is one."""
    return 0


def busy() -> bool:
    """Whether autocast is on, which is in no graph either."""
    return torch.is_autocast_enabled("cpu")


def elsewhere(tensor: torch.Tensor) -> None:
    """There is one device."""
