"""Decoding a token: what does not depend on the cache is captured in CUDA graphs and replayed.

One token through a decoder layer is bound by the host, which launches some thirty kernels. Two
graphs for each layer take their place: one from the norm to the rotated heads, one from what
follows the attention interface to the second sum. The cache and the attention between them run as
before. All of it is the layer's own code, as it is in force, cut into pieces (``program.py``). A
graph launches the very kernels that it was captured from, on the same weights, so that the result
has the same bits. Inputs are copied into a graph's memory and outputs out of it, so that no other
code sees that memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

from hf_kernel_patch.recognition import site as sites
from hf_kernel_patch.recognition.modules import hooked_everywhere
from hf_kernel_patch.recognition.outcome import REPLAYED, CallOutcome, How
from hf_kernel_patch.recognition.rules.decoding.block import (
    Block,
    CannotCapture,
    Slots,
    Step,
    Value,
    Values,
    captured,
    needed,
    run,
    steps,
)
from hf_kernel_patch.recognition.rules.decoding.graphs import Graphs
from hf_kernel_patch.recognition.rules.decoding.parts import Parts, collecting
from hf_kernel_patch.recognition.rules.decoding.program import (
    Program,
    Programs,
    inputs_of,
    program_in,
)
from hf_kernel_patch.recognition.segments import Segment
from hf_kernel_patch.recognition.site import Site

if TYPE_CHECKING:
    import torch
    from torch import nn

#: A layer is captured for a batch after so many calls: the first ones compile kernels.
CALLS_BEFORE = 2
#: Batches that a layer is captured for at most, and the largest; above it the GPU is the limit.
BATCHES, LARGEST_BATCH = 4, 128
#: Different calls, by shapes and other arguments, of which a layer keeps count at most: with more,
#: hardly one of them comes again.
DIFFERENT_CALLS = 1024
#: A layer whose modules or weights changed so often, with no more than so many replays between, is
#: captured no more.
CHANGES, REPLAYS_BETWEEN = 2, 64
#: Types of arguments whose value is in the key of a call; of others, the class is.
_PLAIN = (type(None), bool, int, float, str)


def _cuda() -> Graphs:
    from hf_kernel_patch.ops._shared import graphs

    return graphs


#: A kernel's device -> what imports its graphs. Layers of kernels for other devices are not
#: captured.
GRAPHS: dict[str, Callable[[], Graphs]] = {"cuda": _cuda}

#: (layer, its other arguments in order) -> the layer's result, or None for a fallback: the layer's
#: forward has to run.
Decode = Callable[..., Value]


def decoder(site: Site, name: str) -> Decode:
    """The function that a decoder layer's forward calls first, by this name."""
    import torch

    graphs, tensor = GRAPHS[site.kernel.device](), torch.Tensor
    compiling, with_gradients = torch.compiler.is_compiling, torch.is_grad_enabled
    layers: WeakKeyDictionary[nn.Module, _Layer] = WeakKeyDictionary()
    programs: Programs = {}
    same_device = nullcontext()

    def release() -> None:
        layers.clear()
        programs.clear()

    def decode(layer: nn.Module, hidden_states: torch.Tensor, *given: Value) -> Value:
        if compiling() or not sites.capturing or with_gradients():
            return None
        if not isinstance(hidden_states, tensor) or hidden_states.dim() != 3:
            return None
        batch, length, _ = hidden_states.shape
        if length != 1 or batch > LARGEST_BATCH or not site.in_force(layer):
            return None
        if layer.training or hooked_everywhere() or collecting():
            return None
        if site.why_fallback(hidden_states) or graphs.busy():
            return None
        if (known := layers.get(layer)) is None:
            known = layers[layer] = _Layer(layer, site, name, graphs, programs)
        with graphs.elsewhere(hidden_states) or same_device:
            return known.decode(layer, (layer, hidden_states, *given))

    site.on_release = release
    return decode


class _Captured(NamedTuple):
    """What runs in place of a layer; each part appends to the list of values."""

    before: Block
    attention: Step
    after: Block
    #: From the second graph to the result; the MLP too, where it is not in the graph.
    rest: list[Step]
    #: From the attention interface to the result, for values that the second graph does not fit.
    eager: list[Step]


#: What tells calls with graphs of their own apart.
_Key = tuple[object, ...]
#: The values of a call and its graphs, or its result and None.
_Ready = tuple[Value, _Captured | None]


class _Layer:
    """The graphs of one layer by the shapes of its calls, and its parts when they were captured."""

    def __init__(self, layer: nn.Module, site: Site, name: str, graphs: Graphs, programs: Programs):
        import torch

        self._site, self._name, self._graphs, self._programs = site, name, graphs, programs
        self._lock = threading.Lock()
        self._changes = self._replays = 0
        self._calls: dict[_Key, int] = {}
        self._captured: dict[_Key, _Captured] = {}
        self._tensor = torch.Tensor
        self._look_at(layer)

    def _look_at(self, layer: nn.Module) -> None:
        """The layer's parts as they are now, and its program or why there is none."""
        #: Why the layer runs without graphs, as long as its parts stay as they are.
        self._fallback: str | None = None
        self._captured.clear()
        found = program_in(layer, self._site, self._name, self._programs)
        if isinstance(found, str):
            self._fallback = found
            self._parts = Parts(layer)
            return
        self._program: Program = found
        self._inputs = inputs_of(found)
        self._parts = Parts(layer, found.scope)
        names = (type(module).__name__ for module in self._parts.modules)
        self._has_experts = any("Experts" in name for name in names)

    def decode(self, layer: nn.Module, given: tuple[Value, ...]) -> Value:
        """The layer's result, or None for a fallback."""
        with self._lock:
            found = self._ready(layer, given)
        if found is None:
            if self._fallback is not None:
                self._site.count(_without_graphs(self._fallback), layer)
            return None
        values, graphs = found
        if graphs is None:
            return values
        with self._lock:
            graphs.before.replay(values)
        slots, function = graphs.attention
        values += function(*[values[slot] for slot in slots])
        if not graphs.after.fits(values):
            reason = "its attention gives other shapes than before"
            self._site.count(_without_graphs(reason), layer)
            return _result(graphs.eager, values)
        with self._lock:
            graphs.after.replay(values)
        self._site.count(REPLAYED, layer)
        return _result(graphs.rest, values)

    def _ready(self, layer: nn.Module, given: tuple[Value, ...]) -> _Ready | None:
        """(values, graphs) of this call, or (its result, None); None for a fallback.

        A fallback is a call before the layer is captured, or of a layer that has no graphs.
        """
        if self._changes > CHANGES:
            return None
        if not self._parts.unchanged():
            self._changes = self._changes + 1 if self._replays <= REPLAYS_BETWEEN else 1
            self._replays = 0
            self._look_at(layer)
            if self._changes > CHANGES:
                self._fallback = "the layer's modules or weights keep changing"
        if self._fallback is not None:
            return None
        values = [*given, *self._program.attention_arguments(*given)]
        key = (self._graphs.stream(), *self._key(layer, values))
        if (graphs := self._captured.get(key)) is not None:
            self._replays += 1
            return values, graphs
        if len(self._calls) > DIFFERENT_CALLS:
            self._fallback = "every call is of another kind"
            return None
        self._calls[key] = self._calls.get(key, 0) + 1
        if self._calls[key] <= CALLS_BEFORE or len(self._captured) >= BATCHES:
            return None
        return self._capture(layer, values, key)

    def _key(self, layer: nn.Module, values: Values) -> list[object]:
        """What graphs are made for: shapes, and all else that goes into the first one."""
        key: list[object] = []
        if self._has_experts:  # only then, since reading a configuration is slow
            config = vars(getattr(layer, self._program.attention)).get("config")
            key.append(getattr(config, "_experts_implementation", None))
        for slot in self._inputs:
            value = values[slot]
            for element in value if type(value) in (tuple, list) else (value,):
                if isinstance(element, self._tensor):
                    key += element.shape, element.dtype
                else:
                    key.append(element if type(element) in _PLAIN else type(element))
        return key

    def _capture(self, layer: nn.Module, values: Values, key: _Key) -> _Ready | None:
        """The result of a call whose graphs are captured on the way, or None for a fallback."""
        program = self._program
        if reason := self._parts.why_not():
            self._fallback = reason
            return None
        middle, after, ending = program.middle, program.after, (program.mlp, program.tail)
        later = needed([middle, *after, *ending])
        before = self._block(program.before, program.slots, values, later)
        if isinstance(before, str):
            self._fallback = before
            return None
        block, slots = before
        block.replay(values)
        (attention,), slots = steps([middle], slots, len(values))
        # From here on the cache holds the token, and the layer's forward must not run any more:
        # whatever happens, the rest of this call is computed by these pieces.
        run([attention], values)
        eager, _ = steps([*after, *ending], slots, len(values))
        for inside, rest in (([*after, program.mlp], ending[1:]), ([*after], ending)):
            # The second time without the MLP: experts may wait for results of the device, which
            # cannot be captured.
            found = self._block(inside, slots, values, needed(rest))
            if not isinstance(found, str):
                break
        else:
            self._fallback = str(found)
            return _result(eager, values), None
        found[0].replay(values)
        last, _ = steps(rest, found[1], len(values))
        self._captured[key] = _Captured(block, attention, found[0], last, eager)
        self._site.count(REPLAYED, layer)
        return _result(last, values), None

    def _block(
        self, segments: Sequence[Segment], slots: Slots, values: Values, later: list[str]
    ) -> tuple[Block, Slots] | str:
        """A captured piece and where its values are, or why there is none."""
        import torch

        with torch.inference_mode(False), torch.no_grad():
            try:
                return captured(self._graphs.capture, segments, slots, values, later)
            except CannotCapture as error:
                return str(error)
            except Exception as error:
                text = str(error).splitlines()
                return f"{type(error).__name__}: {text[0] if text else ''}"


def _result(steps: list[Step], values: Values) -> Value:
    """What the last step gives, after the others."""
    for slots, function in steps[:-1]:
        values += function(*[values[slot] for slot in slots])
    slots, function = steps[-1]
    return function(*[values[slot] for slot in slots])


def _without_graphs(reason: str) -> CallOutcome:
    return CallOutcome(How.NOT_REPLAYED, reason)
