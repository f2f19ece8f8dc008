"""Capturing a function of tensors in a CUDA graph, to be replayed on other tensors."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple
from weakref import WeakSet

import torch

Tensors = tuple[torch.Tensor, ...]


class Graph(NamedTuple):
    """A captured function; its memory is its own."""

    graph: torch.cuda.CUDAGraph
    inputs: list[torch.Tensor]
    outputs: Tensors

    def replay(self, *inputs: torch.Tensor) -> Tensors:
        """What the function gives for inputs of the shapes and dtypes of the capture's.

        In one thread at a time, and on the stream that was current at the capture.
        """
        torch._foreach_copy_(self.inputs, inputs)
        self.graph.replay()
        return tuple(output.clone() for output in self.outputs)


#: By the stream of replays: where to capture, the graphs' pool of memory, and those alive.
_streams: dict[int, tuple[torch.cuda.Stream, tuple[int, int], WeakSet[torch.cuda.CUDAGraph]]] = {}


def stream() -> int:
    """The current stream of the current device."""
    return int(torch.cuda.current_stream().cuda_stream)


def capture(function: Callable[..., Tensors], examples: Sequence[torch.Tensor]) -> Graph:
    """Run a function of tensors once and then capture it; raises what it raises.

    Graphs that are replayed on one stream share their memory, but for inputs and outputs.
    """
    current, key = torch.cuda.current_stream(), stream()
    side, pool, alive = _streams.get(key, (None, None, WeakSet()))
    if side is None or pool is None or not alive:  # a pool dies with its last graph
        side, pool = side or torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        _streams[key] = side, pool, alive
    inputs = [torch.empty_like(e, memory_format=torch.contiguous_format) for e in examples]
    torch._foreach_copy_(inputs, list(examples))
    side.wait_stream(current)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(side), _no_collection():
        function(*inputs)
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            outputs = function(*inputs)
        finally:
            graph.capture_end()
    current.wait_stream(side)
    alive.add(graph)
    return Graph(graph, inputs, outputs)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Python's collector might destroy another graph, which a capture does not survive."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()
