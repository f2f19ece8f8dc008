"""Capturing a function in a CUDA graph, to be replayed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple
from weakref import WeakSet

import torch

from hf_kernel_patch.ops._shared.collection import no_collection
from hf_kernel_patch.ops._shared.launch import early_launches

#: A replay launches what was captured; no code of Python runs.
CODE_RUNS = False


class Graph(NamedTuple):
    """A captured function without arguments.

    ``graph`` is a ``torch.cuda.CUDAGraph``, or anything else with ``replay()``.
    """

    graph: torch.cuda.CUDAGraph
    result: Any

    def replay(self) -> Any:
        """What the function gives, in memory that the next replay writes to.

        In one thread at a time, and on the stream that was current at the capture.
        """
        self.graph.replay()
        return self.result


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


def capture(function: Callable[[], Any]) -> Graph:
    """Run a function once and then capture it; raises what it raises.

    Graphs that are replayed on one stream share the memory of what they compute on the way.
    """
    current, key = torch.cuda.current_stream(), stream()
    side, pool, alive = _streams.get(key, (None, None, WeakSet()))
    if side is None or pool is None or not alive:  # a pool dies with its last graph
        side, pool = side or torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        _streams[key] = side, pool, alive
    side.wait_stream(current)
    graph = torch.cuda.CUDAGraph()
    # Python's collector might destroy another graph, which a capture does not survive.
    with torch.cuda.stream(side), no_collection(), early_launches():
        function()
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            result = function()
        finally:
            graph.capture_end()
    current.wait_stream(side)
    alive.add(graph)
    return Graph(graph, result)
