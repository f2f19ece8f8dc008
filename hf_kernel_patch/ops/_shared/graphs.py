"""Capturing a function of tensors in a CUDA graph, to be replayed on other tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple
from weakref import WeakSet

import torch

from hf_kernel_patch.ops._shared.collection import no_collection

Tensors = tuple[torch.Tensor, ...]


class Graph(NamedTuple):
    """A captured function; its memory is its own.

    ``graph`` is a ``torch.cuda.CUDAGraph``, or anything else with ``replay()``.
    """

    graph: torch.cuda.CUDAGraph
    inputs: list[torch.Tensor]
    outputs: Tensors
    #: How many heads each output has, where they are one tensor side by side.
    sizes: list[int] | None = None

    def replay(self, *inputs: torch.Tensor) -> Sequence[torch.Tensor]:
        """What the function gives for inputs of the shapes and dtypes of the capture's.

        In one thread at a time, and on the stream that was current at the capture.
        """
        torch._foreach_copy_(self.inputs, inputs)
        self.graph.replay()
        if self.sizes is not None:
            return self.outputs[0].clone().split_with_sizes(self.sizes, 1)
        return [output.clone() for output in self.outputs]


#: By the stream of replays: where to capture, the graphs' pool of memory, and those alive.
_streams: dict[int, tuple[torch.cuda.Stream, tuple[int, int], WeakSet[torch.cuda.CUDAGraph]]] = {}


def stream() -> int:
    """The current stream of the current device."""
    return int(torch.cuda.current_stream().cuda_stream)


def busy() -> bool:
    """Whether graphs cannot be replayed now: under autocast, or in a capture of somebody else's."""
    return torch.is_autocast_enabled("cuda") or torch.cuda.is_current_stream_capturing()


def elsewhere(tensor: torch.Tensor) -> AbstractContextManager[object] | None:
    """What makes a tensor's device the current one, or None where it is."""
    if tensor.get_device() == torch.cuda.current_device():
        return None
    return torch.cuda.device(tensor.device)


def capture(function: Callable[..., Tensors], examples: Sequence[torch.Tensor]) -> Graph:
    """Run a function of tensors once and then capture it; raises what it raises.

    Graphs that are replayed on one stream share their memory, but for inputs and outputs.
    """
    current, key = torch.cuda.current_stream(), stream()
    side, pool, alive = _streams.get(key, (None, None, WeakSet()))
    if side is None or pool is None or not alive:  # a pool dies with its last graph
        side, pool = side or torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        _streams[key] = side, pool, alive
    inputs = copied(examples)
    side.wait_stream(current)
    graph = torch.cuda.CUDAGraph()
    # Python's collector might destroy another graph, which a capture does not survive.
    with torch.cuda.stream(side), no_collection():
        joined(function(*inputs))
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            outputs, sizes = joined(function(*inputs))
        finally:
            graph.capture_end()
    current.wait_stream(side)
    alive.add(graph)
    return Graph(graph, inputs, outputs, sizes)


def copied(examples: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Copies in memory of their own."""
    inputs = [torch.empty_like(e, memory_format=torch.contiguous_format) for e in examples]
    torch._foreach_copy_(inputs, list(examples))
    return inputs


def joined(outputs: Tensors) -> tuple[Tensors, list[int] | None]:
    """Heads (B, heads, S, D) side by side in one tensor, which is then copied at once."""
    shapes = {(o.dtype, o.shape[:1], o.shape[2:]) for o in outputs if o.dim() == 4}
    if len(outputs) < 2 or len(shapes) != 1 or any(o.dim() != 4 for o in outputs):
        return outputs, None
    return (torch.cat(outputs, dim=1),), [output.shape[1] for output in outputs]
