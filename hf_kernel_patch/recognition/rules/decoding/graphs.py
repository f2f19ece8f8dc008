"""What decoding needs of a device's module of graphs; ``ops/_shared/graphs.py`` is CUDA's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


class Graph(Protocol):
    """A captured function of tensors."""

    @property
    def inputs(self) -> Sequence[torch.Tensor]:
        """The tensors in the graph's own memory, which it was captured with."""

    def replay(self, *inputs: torch.Tensor) -> Sequence[torch.Tensor]:
        """What the function gives for these tensors."""


class Graphs(Protocol):
    """A device's graphs."""

    def capture(
        self, function: Callable[..., tuple[torch.Tensor, ...]], examples: Sequence[torch.Tensor]
    ) -> Graph:
        """Run a function of tensors like these once, and then capture it."""

    def stream(self) -> int:
        """The stream on which graphs are captured and replayed now."""

    def busy(self) -> bool:
        """Whether graphs cannot be replayed now."""

    def elsewhere(self, tensor: torch.Tensor) -> AbstractContextManager[object] | None:
        """What makes a tensor's device the current one, or None where it is."""
