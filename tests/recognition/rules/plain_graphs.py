"""Graphs for any device: what was captured is called again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from hf_kernel_patch.ops._shared import graphs


class Graph:
    """What runs a function again, on its inputs' memory, and into its outputs'."""

    def __init__(self, run: Callable[[], Any], outputs: Sequence[torch.Tensor]):
        self.run, self.outputs = run, outputs

    def replay(self) -> None:
        torch._foreach_copy_(list(self.outputs), list(self.run()))


class Graphs:
    """As CUDA's, on any device. ``fails`` may raise for what is to be captured."""

    fails: Callable[[Any, int], None] = staticmethod(lambda function, count: None)
    count = 0

    def capture(self, function: Any, examples: Sequence[torch.Tensor]) -> graphs.Graph:
        self.count += 1
        self.fails(function, self.count)
        inputs = graphs.copied(examples)
        function(*inputs)
        outputs, sizes = graphs.joined(function(*inputs))
        graph = Graph(lambda: graphs.joined(function(*inputs))[0], outputs)
        return graphs.Graph(graph, inputs, outputs, sizes)

    def stream(self) -> int:
        return 0

    def busy(self) -> bool:
        return torch.is_autocast_enabled("cpu")

    def elsewhere(self, tensor: torch.Tensor) -> None:
        return None
