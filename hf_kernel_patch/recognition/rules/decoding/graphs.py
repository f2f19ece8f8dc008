"""What decoding needs of a device's module of graphs.

``ops/_shared/graphs.py`` is CUDA's, ``ops/_shared/calls.py`` is for devices without.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch


class Graph(Protocol):
    """A captured function without arguments."""

    def replay(self) -> Any:
        """What the function gives, in memory that the next replay writes to."""


class Graphs(Protocol):
    """A device's graphs."""

    #: Whether a replay runs the captured function's code.
    CODE_RUNS: bool

    def capture(self, function: Callable[[], Any]) -> Graph:
        """Run a function once, and then capture it."""

    def stream(self) -> int:
        """The stream on which graphs are captured and replayed now."""

    def busy(self) -> bool:
        """Whether graphs cannot be replayed now."""

    def elsewhere(self, tensor: torch.Tensor) -> AbstractContextManager[object] | None:
        """What makes a tensor's device the current one, or None where it is."""
