"""Decoding a token: what does not depend on the cache is captured in CUDA graphs and replayed.

One token through a decoder layer is bound by the host, which launches some thirty kernels. Two
graphs a layer take their place, from the norm to the rotated heads and from what follows the
attention interface to the second sum; the cache and the attention between them stay what they are.
All of it is the layer's own code, as it is in force, cut into pieces (``program.py``). A
graph launches the very kernels that it was captured from, on the same weights, so that the result
has the same bits. What goes in is copied in and what comes out is copied out: nobody sees a graph's
memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

from hf_kernel_patch.recognition import site as calls
from hf_kernel_patch.recognition.modules import hooked_everywhere
from hf_kernel_patch.recognition.outcome import REPLAYED, CallOutcome, How
from hf_kernel_patch.recognition.rules.decoding.parts import Parts, collecting
from hf_kernel_patch.recognition.rules.decoding.program import Program, program_of
from hf_kernel_patch.recognition.segments import CannotCut, Segment
from hf_kernel_patch.recognition.site import Site
from hf_kernel_patch.recognition.source import made_by_us

if TYPE_CHECKING:
    from hf_kernel_patch.recognition.rules.decoding.block import Block, Step, Values

#: A layer is captured for a batch when it has met it so often: the first calls compile kernels.
CALLS_BEFORE = 2
#: Batches that a layer is captured for at most, and the largest; above it the GPU is the limit.
BATCHES, LARGEST_BATCH = 4, 128
#: Kinds of calls that a layer is watched for; one with more has no shapes of its own.
KINDS = 1024
#: A layer whose modules or weights changed so often, with no more than so many replays between, is
#: captured no more.
CHANGES, REPLAYS_BETWEEN = 2, 64
#: Types that a key may hold by value.
_PLAIN = (type(None), bool, int, float, str)


def _cuda() -> Any:
    from hf_kernel_patch.ops import graphs

    return graphs


#: A kernel's device -> what gives the module with ``capture``, ``stream``, ``busy``, ``elsewhere``
#: for it. Layers of kernels for other devices are not captured.
GRAPHS: dict[str, Callable[[], Any]] = {"cuda": _cuda}

#: (layer, its other arguments in order) -> the layer's result, or None where it runs as it is.
Decode = Callable[..., Any]


def decoder(site: Site, name: str) -> Decode:
    """What a decoder layer's forward, in which it has this name, asks before anything else."""
    import torch

    graphs, tensor = GRAPHS[site.kernel.device](), torch.Tensor
    compiling, with_gradients = torch.compiler.is_compiling, torch.is_grad_enabled
    layers: WeakKeyDictionary[Any, _Layer] = WeakKeyDictionary()
    programs: _Programs = {}
    here = nullcontext()

    def release() -> None:
        layers.clear()
        programs.clear()

    def decode(layer: Any, hidden_states: Any, *given: Any) -> Any:
        if compiling() or not calls.capturing or with_gradients():
            return None
        if not isinstance(hidden_states, tensor) or hidden_states.dim() != 3:
            return None
        batch, length, _ = hidden_states.shape
        if length != 1 or batch > LARGEST_BATCH or not site.in_force(layer):
            return None
        if layer.training or hooked_everywhere() or collecting():
            return None
        if site.why_not(hidden_states) or graphs.busy():
            return None
        if (known := layers.get(layer)) is None:
            known = layers[layer] = _Layer(layer, site, name, graphs, programs)
        with graphs.elsewhere(hidden_states) or here:
            return known.decode(layer, (layer, hidden_states, *given))

    site.on_release = release
    return decode


class _Graphs(NamedTuple):
    """What replaces a layer around its attention, on a list of values that grows."""

    before: Block
    attend: Step
    after: Block
    #: From the second graph to the result; the MLP too, where it is not in the graph.
    rest: list[Step]
    #: From the attention interface to the result, for values that the second graph does not fit.
    eager: list[Step]


class _Layer:
    """The graphs of one layer, by what goes in, and what has to stay for them to be valid."""

    def __init__(self, layer: Any, site: Site, name: str, graphs: Any, programs: _Programs):
        import torch

        self._site, self._name, self._graphs, self._programs = site, name, graphs, programs
        self._lock = threading.Lock()
        self._changes = self._replays = 0
        self._calls: dict[tuple[Any, ...], int] = {}
        self._captured: dict[tuple[Any, ...], _Graphs] = {}
        self._tensor = torch.Tensor
        self._look_at(layer)

    def _look_at(self, layer: Any) -> None:
        """The layer's parts as they are now, and its program or why there is none."""
        self._program: Any = None
        self._why_not = None
        self._captured.clear()
        made = _program(layer, self._site, self._name, self._programs)
        if isinstance(made, str):
            self._why_not = made
            self._parts = Parts(layer)
            return
        self._program = made
        self._inputs = _inputs(made)
        self._parts = Parts(layer, made.scope)
        kinds = (type(module).__name__ for module in self._parts.modules)
        self._has_experts = any("Experts" in kind for kind in kinds)

    def decode(self, layer: Any, given: tuple[Any, ...]) -> Any:
        with self._lock:
            found = self._ready(layer, given)
        if found is None:
            if self._why_not is not None:
                self._site.count(_without_graphs(self._why_not), layer)
            return None
        values, graphs = found
        if graphs is None:
            return values
        with self._lock:
            graphs.before.replay(values)
        slots, function = graphs.attend
        values += function(*[values[slot] for slot in slots])
        if not graphs.after.fits(values):
            reason = "its attention gives other shapes than before"
            self._site.count(_without_graphs(reason), layer)
            return _result(graphs.eager, values)
        with self._lock:
            graphs.after.replay(values)
        self._site.count(REPLAYED, layer)
        return _result(graphs.rest, values)

    def _ready(self, layer: Any, given: tuple[Any, ...]) -> tuple[Any, _Graphs | None] | None:
        """(values, graphs) of this call, or (its result, None); None where it has to run as it is.

        That is before it is time, or where there are no graphs.
        """
        if self._changes > CHANGES:
            return None
        if not self._parts.unchanged():
            self._changes = self._changes + 1 if self._replays <= REPLAYS_BETWEEN else 1
            self._replays = 0
            self._look_at(layer)
            if self._changes > CHANGES:
                self._why_not = "the layer's modules or weights keep changing"
        if self._why_not is not None:
            return None
        values = [*given, *self._program.hand_over(*given)]
        key = (self._graphs.stream(), *self._key(layer, values))
        if (graphs := self._captured.get(key)) is not None:
            self._replays += 1
            return values, graphs
        if len(self._calls) > KINDS:
            self._why_not = "every call is of another kind"
            return None
        self._calls[key] = self._calls.get(key, 0) + 1
        if self._calls[key] <= CALLS_BEFORE or len(self._captured) >= BATCHES:
            return None
        return self._capture(layer, values, key)

    def _key(self, layer: Any, values: Values) -> list[Any]:
        """What graphs are made for: shapes, and all else that the code before them is given."""
        key: list[Any] = []
        if self._has_experts:  # asking a configuration takes its time
            config = vars(getattr(layer, self._program.attended)).get("config")
            key.append(getattr(config, "_experts_implementation", None))
        for slot in self._inputs:
            value = values[slot]
            for one in value if type(value) in (tuple, list) else (value,):
                if isinstance(one, self._tensor):
                    key += one.shape, one.dtype
                else:
                    key.append(one if type(one) in _PLAIN else type(one))
        return key

    def _capture(
        self, layer: Any, values: Values, key: tuple[Any, ...]
    ) -> tuple[Any, _Graphs | None] | None:
        """The result of a call whose graphs are captured on the way."""
        from hf_kernel_patch.recognition.rules.decoding.block import needed, run, steps

        program: Program = self._program
        if why_not := self._parts.why_not():
            self._why_not = why_not
            return None
        middle, after, ending = program.middle, program.after, (program.mlp, program.tail)
        later = needed([middle, *after, *ending])
        before = self._block(program.before, program.slots, values, later)
        if isinstance(before, str):
            self._why_not = before
            return None
        block, slots = before
        block.replay(values)
        (attend,), slots = steps([middle], slots, len(values))
        # From here on the cache has its token: this call ends by these pieces, in whatever way.
        run([attend], values)
        eager, _ = steps([*after, *ending], slots, len(values))
        for inside, rest in (([*after, program.mlp], ending[1:]), ([*after], ending)):
            # Without the MLP where it has experts that ask the device what to do.
            found = self._block(inside, slots, values, needed(rest))
            if not isinstance(found, str):
                break
        else:
            self._why_not = str(found)
            return _result(eager, values), None
        found[0].replay(values)
        last, _ = steps(rest, found[1], len(values))
        self._captured[key] = _Graphs(block, attend, found[0], last, eager)
        self._site.count(REPLAYED, layer)
        return _result(last, values), None

    def _block(
        self, segments: Sequence[Segment], slots: dict[str, int], values: Values, later: list[str]
    ) -> tuple[Block, dict[str, int]] | str:
        """A captured piece and where its values are, or why there is none."""
        import torch

        from hf_kernel_patch.recognition.rules.decoding.block import CannotCapture, captured

        with torch.inference_mode(False), torch.no_grad():
            try:
                return captured(self._graphs.capture, segments, slots, values, later)
            except CannotCapture as error:
                return str(error)
            except Exception as error:
                text = str(error).splitlines()
                return f"{type(error).__name__}: {text[0] if text else ''}"


def _result(steps: list[Step], values: Values) -> Any:
    """What the last step gives, after the others."""
    for slots, function in steps[:-1]:
        values += function(*[values[slot] for slot in slots])
    slots, function = steps[-1]
    return function(*[values[slot] for slot in slots])


#: By what a layer and its modules run.
_Programs = dict[tuple[Any, ...], Program | str]


def _program(layer: Any, site: Site, name: str, known: _Programs) -> Program | str:
    """The program of a layer in whose forward the site is, or why there is none."""
    composed = (made_by_us(vars(kind).get("forward")) for kind in type(layer).__mro__)
    forward = next((m.function for m in composed if m and site in m.sites.values()), None)
    if forward is None:
        return f"{type(layer).__name__} runs another forward"
    key = forward, *[(n, type(child).forward) for n, child in layer.named_children()]
    if key not in known:
        try:
            known[key] = program_of(forward, name, layer)
        except CannotCut as error:
            known[key] = str(error)
    return known[key]


def _inputs(program: Program) -> list[int]:
    """The slots of what the code before the attention is given, but for the modules."""
    from hf_kernel_patch.recognition.rules.decoding.block import needed

    names = [name for name in needed(program.before) if not name.endswith(".self")]
    return [program.slots[name] for name in names]


def _without_graphs(reason: str) -> CallOutcome:
    return CallOutcome(How.NOT_REPLAYED, reason)
