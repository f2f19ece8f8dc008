"""Decoding a token: what does not depend on the cache is captured in CUDA graphs and replayed.

One token through a decoder layer is bound by the host, which launches some thirty kernels. Two
graphs a layer take their place, from the norm to the rotated heads and from the last projection
to the second sum; the cache and the attention between them stay what they are. A graph launches
the very kernels that it was captured from, on the same weights, so that the result has the same
bits. What goes in is copied in and what comes out is copied out: nobody sees a graph's memory.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from operator import is_
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

from hf_kernel_patch.recognition import site as calls
from hf_kernel_patch.recognition.modules import hooked, hooked_everywhere
from hf_kernel_patch.recognition.rules.attention import (
    Attention,
    attend,
    attention_of,
    modeling_of,
    states,
)
from hf_kernel_patch.recognition.site import REPLAYED, Site, site_of
from hf_kernel_patch.recognition.source import innermost

if TYPE_CHECKING:
    from hf_kernel_patch.ops.graphs import Graph

#: A layer is captured for a batch when it has met it so often: the first calls compile kernels.
CALLS_BEFORE = 2
#: Batches that a layer is captured for at most, and the largest; above it the GPU is the limit.
BATCHES, LARGEST_BATCH = 4, 128
#: A layer whose modules or weights changed so often, with no more than so many replays between, is
#: captured no more.
CHANGES, REPLAYS_BETWEEN = 2, 64
_WITHOUT = "served without CUDA graphs: "
#: What a layer hands to its attention that is not for the attention interface.
_OWN = {"attention_mask", "past_key_values", "position_embeddings"}
#: Modules whose forward may be captured: it has no effect but its result.
_HOMES = ("torch.nn.", "transformers.")

Decode = Callable[[Any, Any, dict[str, Any]], Any]


def decoder(site: Site, spec: Any) -> Decode:
    """decode(layer, hidden_states, given) of a decoder layer's form.

    ``spec`` is the form's ``decoder_layer.Layer`` and ``given`` the layer's other arguments by
    name. It returns the layer's output, or None where the layer has to run as it is.
    """
    import torch

    layers: WeakKeyDictionary[Any, _Layer] = WeakKeyDictionary()
    site.on_release = layers.clear

    def decode(layer: Any, hidden_states: Any, given: dict[str, Any]) -> Any:
        if not calls.capturing or torch.is_grad_enabled() or hidden_states.dim() != 3:
            return None
        batch, length, _ = hidden_states.shape
        cache, embeddings = given.get("past_key_values"), given.get("position_embeddings")
        if length != 1 or batch > LARGEST_BATCH or cache is None or embeddings is None:
            return None
        if layer.training or torch.is_autocast_enabled("cuda") or _collecting():
            return None
        if hooked_everywhere():
            return None
        if site.why_not(hidden_states, *embeddings) or torch.cuda.is_current_stream_capturing():
            return None
        if (known := layers.get(layer)) is None:
            known = layers[layer] = _Layer(layer, site, spec)
        if hidden_states.get_device() == torch.cuda.current_device():
            return known.decode(layer, hidden_states, embeddings, cache, given)
        with torch.cuda.device(hidden_states.device):
            return known.decode(layer, hidden_states, embeddings, cache, given)

    return decode


class _Layer:
    """The graphs of one layer, by what goes in, and what has to stay for them to be valid."""

    def __init__(self, layer: Any, site: Site, spec: Any):
        self._site, self._spec = site, spec
        self._lock = threading.Lock()
        self._why_not: str | None = None
        self._changes = self._replays = 0
        self._calls: dict[tuple[Any, ...], int] = {}
        self._graphs: dict[tuple[Any, ...], _Graphs] = {}
        self._parts = _Parts(layer)

    def decode(
        self, layer: Any, hidden_states: Any, embeddings: Any, cache: Any, given: dict[str, Any]
    ) -> Any:
        with self._lock:
            graphs = self._graphs_for(layer, hidden_states, embeddings)
        if graphs is None:
            if self._why_not is not None:
                self._site.count(self._why_not)
            return None
        with self._lock:
            (heads,) = graphs.before.replay(hidden_states, *embeddings)
        kwargs = {name: value for name, value in given.items() if name not in _OWN}
        out, _ = attend(
            layer.self_attn,
            graphs.attention,
            graphs.modeling,
            heads.split(graphs.heads, dim=1),
            embeddings,
            given.get("attention_mask"),
            cache,
            kwargs,
        )
        with self._lock:
            found = graphs.after.replay(out, hidden_states)
        self._site.count(REPLAYED)
        return found[0] if graphs.whole else self._spec.feed(layer, *found)

    def _graphs_for(self, layer: Any, hidden_states: Any, embeddings: Any) -> _Graphs | None:
        """The graphs for these shapes; None before it is time, or where there are none."""
        if self._changes > CHANGES:
            return None
        if not self._parts.unchanged():
            self._changes = self._changes + 1 if self._replays <= REPLAYS_BETWEEN else 1
            self._parts, self._replays, self._why_not = _Parts(layer), 0, None
            self._graphs.clear()
            if self._changes > CHANGES:
                self._why_not = f"{_WITHOUT}the layer's modules or weights keep changing"
        if self._why_not is not None:
            return None
        from hf_kernel_patch.ops.graphs import stream

        cos, _ = embeddings
        key = (*hidden_states.shape, hidden_states.dtype, *cos.shape, cos.dtype, stream())
        config = getattr(layer.self_attn, "config", None)
        key = (*key, getattr(config, "_experts_implementation", None))
        if (graphs := self._graphs.get(key)) is not None:
            self._replays += 1
            return graphs
        self._calls[key] = self._calls.get(key, 0) + 1
        if self._calls[key] <= CALLS_BEFORE or len(self._graphs) >= BATCHES:
            return None
        made = _capture(layer, self._site, self._spec, (hidden_states, *embeddings), self._parts)
        if isinstance(made, str):
            self._why_not = f"{_WITHOUT}{made}"
            return None
        self._graphs[key] = made
        return made


class _Parts:
    """The modules and weights inside of a layer, as they were."""

    def __init__(self, layer: Any):
        modules = list(layer.modules())[1:]  # the layer's own hooks run whether captured or not
        self.modules = modules
        self._slots = [(m._modules, name) for m in [layer, *modules] for name in m._modules]
        self._children = [mapping[name] for mapping, name in self._slots]
        self._kinds = [type(module) for module in modules]
        self._forwards = [kind.forward for kind in self._kinds]
        self._training = [module.training for module in modules]
        self._touched = list(map(_touched, modules))
        held = [kept for m in modules for kept in (m._parameters, m._buffers)]
        self._places = [
            (kept, n) for kept in held for n, value in kept.items() if value is not None
        ]
        self.tensors = [kept[name] for kept, name in self._places]
        # A subclass, such as a quantised weight, may have no memory of its own.
        self._plain = [tensor for tensor in self.tensors if _is_plain(tensor)]
        self._pointers = [tensor.data_ptr() for tensor in self._plain]
        self._scope = getattr(innermost(type(layer.self_attn).forward), "__globals__", {})
        self._rotary = self._scope.get("apply_rotary_pos_emb")

    def unchanged(self) -> bool:
        """Whether every module, its class's forward and every weight's memory is what it was."""
        return (
            list(map(_touched, self.modules)) == self._touched
            and all(map(is_, [mapping.get(n) for mapping, n in self._slots], self._children))
            and all(map(is_, map(type, self.modules), self._kinds))
            and all(map(is_, [kind.forward for kind in self._kinds], self._forwards))
            and [module.training for module in self.modules] == self._training
            and all(map(is_, [kept.get(name) for kept, name in self._places], self.tensors))
            and [tensor.data_ptr() for tensor in self._plain] == self._pointers
            and self._scope.get("apply_rotary_pos_emb") is self._rotary
        )

    def why_not(self) -> str | None:
        """Why a layer of these parts cannot be captured."""
        for module, kind in zip(self.modules, self._kinds):
            if not kind.__module__.startswith(_HOMES):
                return f"{kind.__qualname__} of {kind.__module__} is no part of transformers"
            if _touched(module):
                return f"a hook on {kind.__qualname__} needs the original"
        for tensor in self.tensors:
            if not _is_plain(tensor):
                return f"a weight is a {type(tensor).__name__}"
        return None


def _is_plain(tensor: Any) -> bool:
    import torch

    return type(tensor) in (torch.Tensor, torch.nn.Parameter)


def _touched(module: Any) -> bool:
    """As ``hooked``, but for the hooks by which transformers collects outputs when asked to."""
    if not hooked(module):
        return False
    hooks = module._forward_hooks.values()
    if not hooks or any("output_capturing" not in str(hook.__module__) for hook in hooks):
        return True
    return "forward" in vars(module) or bool(module._forward_pre_hooks or module._backward_hooks)


def _collecting() -> bool:
    """Whether transformers collects outputs from inside of layers, by hooks, in this call."""
    module = sys.modules.get("transformers.utils.output_capturing")
    collected = None if module is None else module._active_collector.get()
    return any(key != "hidden_states" and key[0] != "_" for key in collected or ())


class _Graphs(NamedTuple):
    """What replaces a layer around its attention."""

    #: (hidden_states, cos, sin) -> q, k and v side by side, (B, all heads, 1, D).
    before: Graph
    #: (attention's output, hidden_states) -> the layer's output; the norm and the sum if not whole.
    after: Graph
    heads: list[int]
    attention: Attention
    modeling: Any
    #: Whether the MLP is captured too.
    whole: bool


def _capture(
    layer: Any, site: Site, spec: Any, examples: Sequence[Any], parts: _Parts
) -> _Graphs | str:
    """The graphs of a layer for inputs like these, or the reason why there are none."""
    import torch

    from hf_kernel_patch.ops.graphs import capture

    attention: Any = layer.self_attn
    forward = type(attention).forward
    if why_not := parts.why_not():
        return why_not
    known = attention_of(forward)
    if known is None:
        return f"{type(attention).__name__} is no known attention"
    rotary = innermost(forward).__globals__["apply_rotary_pos_emb"]
    fused = site_of(forward)
    sizes: list[int] = []

    def before(hidden_states: Any, cos: Any, sin: Any) -> tuple[Any, ...]:
        x = layer.input_layernorm(hidden_states)
        q_k_v = states(attention, known, x, (cos, sin), rotary, fused, {})
        if len({part.dtype for part in q_k_v}) > 1:
            raise TypeError("q, k and v differ in dtype")
        sizes[:] = [part.shape[1] for part in q_k_v]
        return (torch.cat(q_k_v, dim=1),)

    def after(out: Any, residual: Any) -> tuple[Any, ...]:
        residual, x = spec.add_and_norm(layer, site, {}, attention.o_proj(out), residual)
        return (spec.feed(layer, x, residual),)

    def without_mlp(out: Any, residual: Any) -> tuple[Any, ...]:
        residual, x = spec.add_and_norm(layer, site, {}, attention.o_proj(out), residual)
        return x, residual

    with torch.inference_mode(False), torch.no_grad():
        try:
            first = capture(before, examples)
            (heads,) = first.outputs
            out = heads.new_zeros(heads.shape[0], 1, sizes[0] * heads.shape[-1])
            try:
                second, whole = capture(after, (out, examples[0])), True
            except Exception:  # experts that ask the device what to do
                second, whole = capture(without_mlp, (out, examples[0])), False
        except Exception as error:
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return _Graphs(first, second, sizes, known, modeling_of(forward), whole)
