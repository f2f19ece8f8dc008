"""One model's captured tokens: when one is captured, what is checked, and its replay."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, ref

from hf_kernel_patch.recognition import site as sites
from hf_kernel_patch.recognition.function import function_of
from hf_kernel_patch.recognition.modules import hooked_everywhere
from hf_kernel_patch.recognition.outcome import REPLAYED, CallOutcome, How
from hf_kernel_patch.recognition.rules.decoding.attention import entries_of
from hf_kernel_patch.recognition.rules.decoding.caches import (
    check_class,
    length_of,
    methods_of_caches,
)
from hf_kernel_patch.recognition.rules.decoding.call import Call, CannotCapture, parameters_of, read
from hf_kernel_patch.recognition.rules.decoding.graphs import Graphs
from hf_kernel_patch.recognition.rules.decoding.memory import Memory
from hf_kernel_patch.recognition.rules.decoding.parts import Parts, collecting
from hf_kernel_patch.recognition.rules.decoding.products import Products
from hf_kernel_patch.recognition.rules.decoding.token import Token, why_not
from hf_kernel_patch.recognition.site import Site
from hf_kernel_patch.recognition.source import made_by_us
from hf_kernel_patch.recognition.wrappers import innermost_of

if TYPE_CHECKING:
    import torch
    from torch import nn

#: A token is captured after so many calls of its kind: the first ones compile kernels.
CALLS_BEFORE = 2
#: Graphs that a model has at most, and sequences that one decodes: above, the GPU is the limit.
GRAPHS_A_MODEL, LARGEST_BATCH = 16, 128
#: Different calls of which a model keeps count at most: with more, hardly one comes again.
DIFFERENT_CALLS = 1024
#: A model that changed so often, with no more than so many replays between, is captured no more.
CHANGES, REPLAYS_BETWEEN = 4, 64


def _cuda() -> Graphs:
    from hf_kernel_patch.ops._shared import graphs

    return graphs


def _calls() -> Graphs:
    from hf_kernel_patch.ops._shared import calls

    return calls


#: A kernel's device -> what imports its graphs.
GRAPHS: dict[str, Callable[[], Graphs]] = {"cuda": _cuda}

#: A kernel's device -> what runs the linear layers of a captured token together.
PRODUCTS: dict[str, Callable[[], Products]] = {"cuda": Products}

#: Set in a thread that runs a model's forward for a capture, in which nothing else is captured.
_thread = threading.local()


def serve(site: Site) -> Callable[..., Any]:
    """(model, its forward's other arguments in order) -> its output, or None for a fallback.

    After a fallback the model's own code has to run.
    """
    import torch

    graphs, tensor = GRAPHS.get(site.kernel.device, _calls)(), torch.Tensor
    compiling, with_gradients = torch.compiler.is_compiling, torch.is_grad_enabled
    function = function_of(innermost_of(site.original))
    names = parameters_of(function)[1:]
    stars = names[-1] if function.node.args.kwarg is not None else ""
    ids_at = names.index("input_ids")
    embeds_at = names.index("inputs_embeds") if "inputs_embeds" in names else ids_at
    models: WeakKeyDictionary[nn.Module, _Model] = WeakKeyDictionary()
    same_device = nullcontext()

    def decode(model: nn.Module, *given: Any) -> Any:
        if compiling() or not sites.capturing or with_gradients():
            return None
        token = given[ids_at]
        if token is None:
            token = given[embeds_at]
        if not isinstance(token, tensor) or token.dim() < 2 or token.shape[1] != 1:
            return None
        if model.training or getattr(_thread, "captures", False) or not site.in_force(model):
            return None
        arguments = dict(zip(names, given))
        if stars:
            arguments |= arguments.pop(stars)
        if (known := models.get(model)) is None:
            known = models[model] = _Model(model, site, graphs)
        with graphs.elsewhere(token) or same_device:
            return known.decode(model, arguments, token)

    site.on_release = models.clear
    return decode


class _Model:
    """The graphs of one model by what its calls have in common, and what they were captured of."""

    def __init__(self, model: nn.Module, site: Site, graphs: Graphs):
        self._site, self._graphs = site, graphs
        self._products = PRODUCTS.get(site.kernel.device, lambda: None)
        self._lock = threading.Lock()
        self._memories: WeakKeyDictionary[Any, Memory] = WeakKeyDictionary()
        self._tokens: dict[tuple[object, ...], Token] = {}
        self._calls: dict[tuple[object, ...], int] = {}
        self._parts: Parts | None = None
        self._changes = self._replays = 0
        #: Calls with a graph in common -> why they have none, as long as the model stays as it is.
        self._failed: dict[tuple[object, ...], str] = {}
        #: The cache for which it was asked last whether the model has stayed so.
        self._asked_for = ref(model)

    def decode(self, model: nn.Module, arguments: dict[str, Any], token: torch.Tensor) -> Any:
        """The output, or None for a fallback."""
        with self._lock:
            try:
                call = read(arguments, token)
                output, how = self._output(model, call)
            except CannotCapture as error:
                output, how = None, CallOutcome(How.NOT_REPLAYED, str(error))
        if how is not None:
            self._site.count(how, model)
        return output

    def _output(self, model: nn.Module, call: Call) -> tuple[Any, CallOutcome | None]:
        """The output or None for a fallback, and what to count."""
        kind = self._graphs.stream(), call.token.device, *call.key
        self._check(call, kind)
        batch, device = call.token.shape[0], call.token.device
        memory = self._memories.get(call.cache)
        if memory is not None and not memory.is_shown_by(call.cache):
            memory = None
        length = memory.length if memory else length_of(call.cache, device, batch)
        if call.mask is not None and call.mask.shape != (batch, length + 1):
            raise CannotCapture("the attention mask is not as long as cache and token")
        self._calls[kind] = self._calls.get(kind, 0) + 1
        if self._calls[kind] <= CALLS_BEFORE:
            return None, None
        if len(self._calls) > DIFFERENT_CALLS:
            raise CannotCapture("every call is of another kind")
        if memory is None:
            memory = self._memories[call.cache] = Memory(call.cache, length)
        memory.make_room()
        key = *kind, memory.number()
        found = self._tokens.get(key)
        if found is None:
            return self._captured(model, call, memory, kind, key)
        parts, runs_code = self._parts, self._graphs.CODE_RUNS
        # A graph runs while it is asked whether it had to be replayed: only what it reads has to
        # be there before.
        if parts is None or not (parts.unchanged() if runs_code else parts.in_place()):
            self._changed()
            return None, None
        output = found.replay(call, memory)
        if not runs_code and not parts.unchanged():
            self._changed()
            return None, None
        self._replays += 1
        memory.advance(call.cache)
        return output, REPLAYED

    def _check(self, call: Call, kind: tuple[object, ...]) -> None:
        """Raises CannotCapture for a call that no graph may serve now."""
        if self._failed and (reason := self._failed.get(kind)) is not None:
            if self._asked_for() is not call.cache:
                if self._parts is None or not self._parts.unchanged():
                    self._failed.clear()
                else:
                    self._asked_for = ref(call.cache)
            if self._failed:
                raise CannotCapture(reason)
        if call.token.shape[0] > LARGEST_BATCH:
            raise CannotCapture(f"more than {LARGEST_BATCH} sequences are decoded")
        check_class(call.cache)
        if hooked_everywhere():
            raise CannotCapture("torch has hooks for every module")
        if collecting():
            raise CannotCapture("outputs of layers are asked for")
        tensors = [call.token, *call.tensors.values()]
        if reason := self._site.why_fallback(*tensors, call.mask):
            raise CannotCapture(reason)
        if self._graphs.busy():
            raise CannotCapture("autocast, or a capture of somebody else's, is on")

    def _changed(self) -> None:
        """The model is not what was captured."""
        self._changes = self._changes + 1 if self._replays <= REPLAYS_BETWEEN else 1
        self._replays = 0
        self._tokens.clear()
        self._failed.clear()
        self._parts = None

    def _captured(
        self,
        model: nn.Module,
        call: Call,
        memory: Memory,
        kind: tuple[object, ...],
        key: tuple[object, ...],
    ) -> tuple[Any, CallOutcome | None]:
        """The original's output for a call, whose graph is made beside it.

        The graph's output has to be the original's but for rounding.
        """
        try:
            if self._changes > CHANGES:
                raise CannotCapture("the model's modules or weights keep changing")
            if len(self._tokens) >= GRAPHS_A_MODEL:
                self._tokens.pop(next(iter(self._tokens)))
            token, found = self._capture(model, call, memory)
        except CannotCapture as error:
            self._failed[kind], self._asked_for = str(error), ref(call.cache)
            raise
        output = self._run(ref(model), call.arguments())
        if reason := why_not(found, output):
            self._failed[kind], self._asked_for = reason, ref(call.cache)
            return output, CallOutcome(How.NOT_REPLAYED, reason)
        self._tokens[key] = token
        return output, None

    def _capture(self, model: nn.Module, call: Call, memory: Memory) -> tuple[Token, Any]:
        """A token like this call's and its output; raises CannotCapture whatever hinders it."""
        import torch

        try:
            entries = entries_of([model, *model.modules()])
            watched = [*entries, *methods_of_caches()]
            if self._parts is None or not self._parts.unchanged():
                self._tokens.clear()
                self._parts = Parts(model, watched)
            if reason := self._parts.why_not(call.token.device):
                raise CannotCapture(reason)
            with torch.inference_mode(False), torch.no_grad():
                token = Token(self._site, call, memory)
                run = partial(self._run, ref(model))
                products = self._products()
                output = token.capture(call, memory, run, entries, self._graphs, products)
        except CannotCapture:
            raise
        except Exception as error:
            text = str(error).splitlines()
            name = type(error).__name__
            raise CannotCapture(f"{name}: {text[0] if text else ''}"[:200]) from None
        return token, output

    def _run(self, held: ref[nn.Module], arguments: dict[str, Any]) -> Any:
        """What the model's forward gives, with nothing decoded inside of it."""
        model = held()
        assert model is not None
        forward = self._forward(model)
        _thread.captures = True
        try:
            return forward(model, **arguments)
        finally:
            _thread.captures = False

    def _forward(self, model: nn.Module) -> Any:
        """The function that asked, as it is in force."""
        held = (made_by_us(vars(cls).get("forward")) for cls in type(model).__mro__)
        made = next((m for m in held if m and self._site in m.sites.values()), None)
        if made is None:
            raise CannotCapture(f"{type(model).__name__} runs another forward")
        return inspect.unwrap(made.function)
