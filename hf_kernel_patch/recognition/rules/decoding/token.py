"""One captured token: the memory that it is given, and what it gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache as once
from typing import TYPE_CHECKING, Any

from hf_kernel_patch.recognition.rules.decoding.attention import Entry, StandIn
from hf_kernel_patch.recognition.rules.decoding.call import Call, CannotCapture
from hf_kernel_patch.recognition.rules.decoding.graphs import Graph, Graphs
from hf_kernel_patch.recognition.rules.decoding.memory import Memory, bucket_for
from hf_kernel_patch.recognition.rules.decoding.products import Products
from hf_kernel_patch.recognition.rules.decoding.slots import Slots
from hf_kernel_patch.recognition.rules.decoding.top_k import choosing
from hf_kernel_patch.recognition.site import Site

if TYPE_CHECKING:
    import torch

#: How far the logits of a graph may be from the original's, as ‖graph − original‖ / ‖original‖.
#: What is wrong is far beyond it; a router that chooses another expert by rounding is not.
TOLERANCE = {"float32": 1e-3, "float64": 1e-6}
ROUNDED = 0.1


class Token:
    """A token of some sequences, captured: replayed on other tokens, caches and lengths."""

    def __init__(self, site: Site, call: Call, memory: Memory):
        import torch

        device, batch = call.token.device, call.token.shape[0]
        self._slots = Slots(memory, device)
        #: The tensors that it reads, each with a copy of its own of what a call gives.
        self._inputs = {name: _own(tensor) for name, tensor in call.tensors.items()}
        self._position = torch.zeros(1, dtype=torch.int64, device=device)
        self._size = bucket_for(memory.length + 1)
        self._positions = torch.arange(self._size, device=device)
        self._mask: torch.Tensor | None = None
        if call.mask is not None:
            self._mask = torch.zeros(batch, self._size, dtype=torch.bool, device=device)
        self._stand_in = StandIn(site.op, self._slots, call.cache, self._position, batch)
        self._graph: Graph | None = None
        #: Whether a replay runs the model's code, which has to have the memory's tensors at hand.
        self._runs_code = True

    def capture(
        self,
        call: Call,
        memory: Memory,
        run: Callable[[dict[str, Any]], Any],
        entries: Sequence[Entry],
        graphs: Graphs,
        products: Products | None,
    ) -> Any:
        """Capture what ``run`` does with a model's arguments; the output for this call.

        ``call`` and ``memory`` are those that it was made for, ``entries`` the functions for which
        the stand-in stands in; ``products`` runs linear layers together.
        """
        cache_name = call.cache_name
        given = {**call.plain, **self._inputs}
        if "attention_mask" in given or self._mask is not None:
            given["attention_mask"] = self._mask
        if given.get("cache_position", self) is None:
            given["cache_position"] = self._position

        def step() -> Any:
            with self._stand_in.in_place(entries), self._stand_in.running():
                return run({**given, cache_name: self._stand_in.cache()})

        self._write(call, memory)
        with self._slots.tensors_of(memory):
            if products is not None:
                with products.recorded():
                    step()
            captured = step if products is None else products.served()(choosing()(step))
            self._graph, self._runs_code = graphs.capture(captured), graphs.CODE_RUNS
            return _given_out(self._graph.replay(), call.cache)

    def replay(self, call: Call, memory: Memory) -> Any:
        """The output for another call of the kind."""
        assert self._graph is not None
        self._write(call, memory)
        with self._slots.tensors_of(memory) if self._runs_code else nullcontext():
            return _given_out(self._graph.replay(), call.cache)

    def _write(self, call: Call, memory: Memory) -> None:
        """Copy what a call gives to where the captured token reads it."""
        import torch

        length = memory.length
        self._slots.bind(memory)
        into = [*self._inputs.values(), self._position]
        given = [
            *(call.tensors[name] for name in self._inputs),
            self._positions[length : length + 1],
        ]
        torch._foreach_copy_(into, given)
        if self._mask is not None:
            self._mask[:, : length + 1].copy_(call.mask)


def why_not(found: Any, original: Any) -> str:
    """Why the output of a graph is not the original's, or ""."""
    if type(found) is not type(original) or found.logits.shape != original.logits.shape:
        return "its output has another form than the original's"
    mine, theirs = found.logits.double(), original.logits.double()
    error = float((mine - theirs).norm() / theirs.norm())
    allowed = TOLERANCE.get(str(original.logits.dtype).removeprefix("torch."), ROUNDED)
    return "" if error <= allowed else f"its logits would be {error:.1e} from the original's"


def _own(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _given_out(value: Any, cache: Any) -> Any:
    """A copy of what a graph gave, with the cache that was given in place of the stand-in."""
    tensor, caches, output = _classes()
    if isinstance(value, tensor):
        return value.clone()
    if isinstance(value, caches):
        return cache
    if isinstance(value, output):
        return type(value)(**{name: _given_out(one, cache) for name, one in value.items()})
    if type(value) in (tuple, list):
        return type(value)(_given_out(one, cache) for one in value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise CannotCapture(f"its output has a {type(value).__name__}")


@once
def _classes() -> tuple[Any, Any, Any]:
    """Of tensors, caches and outputs: asked for once, as this is part of every token."""
    import torch
    from transformers.cache_utils import Cache
    from transformers.utils import ModelOutput

    return torch.Tensor, Cache, ModelOutput
