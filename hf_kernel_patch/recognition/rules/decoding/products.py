"""The linear layers of a decoded token, found while it runs, and run several in one launch.

A token that is to be captured in a graph runs once under :meth:`Products.recorded`, which notes
each call of ``F.linear``. In the runs under :meth:`Products.served`, the first of the calls that
had the very same input computes them all, and each of the others is given its result when its turn
comes. This needs no knowledge of the model's code. A call that is not as noted runs as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from hf_kernel_patch.recognition.rules.decoding.listening import Handler, listening

if TYPE_CHECKING:
    import torch

#: Computes one tensor, and several.
Function = Callable[..., "torch.Tensor"]
Launch = Callable[..., Sequence["torch.Tensor"]]
#: Weights of one launch at most.
MOST_WEIGHTS = 8


class _Call(NamedTuple):
    """A call of ``F.linear``, with its names of the arguments."""

    input: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None = None


class _Group(NamedTuple):
    """Calls with one input, in order; ``activation`` where two of them are a gate and its up."""

    shape: torch.Size
    activation: str | None
    weights: list[torch.Tensor]
    biases: list[torch.Tensor | None]
    #: Of the weights when the run was recorded.
    versions: list[int]


class _Noted(NamedTuple):
    """A call of the recorded run, and its place in a group, if it has one."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    group: _Group | None
    place: int


class _Results(NamedTuple):
    """What a group's launch gave, and what it was computed from."""

    x: torch.Tensor
    sources: tuple[object, ...]
    outputs: dict[int, torch.Tensor]


class Products:
    """Runs the linear layers of one token in fewer launches.

    >>> products = Products()
    >>> with products.recorded():
    ...     token()
    >>> with products.served(), torch.cuda.graph(graph):
    ...     token()

    All runs are of the same code under no_grad, in one thread. Weights that are no plain
    ``Parameter``, such as quantised ones, and calls under autocast run as ever.

    Args:
        linears, gated, pays: those of ``ops.decode_linear.triton``, or functions like them.
        swiglu: the function whose calls a product of :func:`gated` replaces; a
            ``TorchFunctionMode`` has to see them, as it does if the function asks
            ``has_torch_function``. None leaves these products alone.
        device: the type of device on which to run them.
    """

    def __init__(
        self,
        linears: Launch | None = None,
        pays: Callable[..., bool] | None = None,
        gated: Launch | None = None,
        swiglu: Function | None = None,
        device: str = "cuda",
    ):
        if linears is None or pays is None:
            from hf_kernel_patch.ops.decode_linear import triton as ours
            from hf_kernel_patch.ops.swiglu.triton import swiglu as fused

            linears, pays, gated, swiglu = ours.linears, ours.pays, ours.gated, fused
        self._linears, self._pays, self._gated = linears, pays, gated
        self._swiglu = None if gated is None else swiglu
        self._device = device
        self._noted: list[_Noted] = []

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Note the calls of a run, in place of those of an earlier one."""
        record = _Record(self)
        with _heard(record):
            yield
        self._noted = record.noted(self._pays)

    @contextmanager
    def served(self) -> Iterator[None]:
        """Run calls together that are as noted."""
        with _heard(_Service(self)):
            yield


class _Record:
    """Notes the calls of a run; what it has seen stays alive so that no id comes twice."""

    def __init__(self, products: Products):
        self._device, self._swiglu = products._device, products._swiglu
        self._calls: list[tuple[_Call, int | None]] = []  # None: not one that can be served
        self._groups: list[list[int]] = []  # indices of calls
        self._inputs: dict[tuple[int, int], int] = {}  # id and version -> group
        self._outputs: dict[int, tuple[torch.Tensor, int]] = {}  # id -> output, index of its call
        self._gates: dict[tuple[int, int], str] = {}  # indices of gate and up -> activation

    def linear(self, function: Function, call: _Call) -> torch.Tensor:
        index, group = len(self._calls), None
        if _fits(call, self._device):
            key = id(call.input), call.input._version
            group = self._inputs.setdefault(key, len(self._groups))
            if group == len(self._groups):
                self._groups.append([])
            self._groups[group].append(index)
        self._calls.append((call, group))
        out = function(*call)
        self._outputs[id(out)] = out, index
        return out

    def swiglu(self, function: Function, gate: Any, up: Any, activation: str = "silu") -> Any:
        _, first = self._outputs.get(id(gate), (None, -1))
        _, second = self._outputs.get(id(up), (None, -1))
        if 0 <= first < second and gate.shape == up.shape:
            group = self._calls[first][1]
            if group is not None and group == self._calls[second][1]:
                self._gates[first, second] = activation
        return function(gate, up, activation)

    def noted(self, pays: Callable[..., bool]) -> list[_Noted]:
        """The calls in order, with the groups that pay."""
        places: dict[int, tuple[_Group, int]] = {}
        for indices, activation in self._launches():
            calls = [self._calls[index][0] for index in indices]
            weights, x = [call.weight for call in calls], calls[0].input
            k = x.shape[-1]
            if pays(x.numel() // k, k, [len(weight) for weight in weights], x.dtype):
                biases = [call.bias for call in calls]
                versions = [weight._version for weight in weights]
                group = _Group(x.shape, activation, weights, biases, versions)
                places |= {index: (group, place) for place, index in enumerate(indices)}
        return [
            _Noted(call.weight, call.bias, *places.get(index, (None, 0)))
            for index, (call, _) in enumerate(self._calls)
        ]

    def _launches(self) -> Iterator[tuple[list[int], str | None]]:
        """The calls that one launch can serve, and the activation of a gate and its up."""
        gates = {index for pair in self._gates for index in pair}
        if len(gates) < 2 * len(self._gates):  # one of them in two products
            self._gates, gates = {}, set()
        for pair, activation in self._gates.items():
            yield list(pair), activation
        for group in self._groups:
            plain = [index for index in group if index not in gates]
            for start in range(0, len(plain), MOST_WEIGHTS):
                yield plain[start : start + MOST_WEIGHTS], None


class _Service:
    """Serves the calls of a run that are as noted."""

    def __init__(self, products: Products):
        self._products, self._swiglu = products, products._swiglu
        self._next = 0
        self._results: dict[int, _Results] = {}  # by id of the group
        #: By what it is computed from, which stays alive so that no id comes twice.
        self._gated: dict[tuple[object, ...], tuple[torch.Tensor, ...]] = {}

    def linear(self, function: Function, call: _Call) -> torch.Tensor:
        noted = self._as_noted(call)
        if noted is None or noted.group is None:
            return function(*call)
        found = self._result(noted.group, noted.place, call)
        return function(*call) if found is None else found

    def swiglu(self, function: Function, gate: Any, up: Any, activation: str = "silu") -> Any:
        if self._gated:
            known = self._gated.pop(_factors(gate, up, activation), None)
            if known is not None:
                return known[2]
        return function(gate, up, activation)

    def _as_noted(self, call: _Call) -> _Noted | None:
        """The note of this call: the next one with its weight, as the run may skip some calls."""
        for index in range(self._next, len(self._products._noted)):
            noted = self._products._noted[index]
            if noted.weight is call.weight and noted.bias is call.bias:
                self._next = index + 1
                return noted
        return None

    def _result(self, group: _Group, place: int, call: _Call) -> torch.Tensor | None:
        results = self._results.pop(id(group), None)
        if results is None:
            # Later than at the first call of the group it is not known which are still to come.
            if place or not self._as_recorded(group, call.input):
                return None
            sources = _sources(group, call.input)
            results = _Results(call.input, sources, self._launched(group, call.input))
        elif call.input is not results.x or _sources(group, call.input) != results.sources:
            return None
        output = results.outputs.pop(place, None)
        if results.outputs:
            self._results[id(group)] = results
        return output

    def _as_recorded(self, group: _Group, x: torch.Tensor) -> bool:
        """Whether the group can be launched: no run writes to its weights, for instance."""
        if x.shape != group.shape:
            return False
        if any(w._version != version for w, version in zip(group.weights, group.versions)):
            return False
        device, calls = self._products._device, zip(group.weights, group.biases)
        return all(_fits(_Call(x, weight, bias), device) for weight, bias in calls)

    def _launched(self, group: _Group, x: torch.Tensor) -> dict[int, torch.Tensor]:
        if group.activation is None:
            return dict(enumerate(self._products._linears(x, group.weights, group.biases)))
        gated = self._products._gated
        assert gated is not None
        gate, up, product = gated(x, *group.weights, group.activation, *group.biases)
        self._gated[_factors(gate, up, group.activation)] = gate, up, product
        return {0: gate, 1: up}


def _fits(call: _Call, device: str) -> bool:
    """Whether the kernels can compute this call, and nothing sees the difference."""
    import torch

    x, weight, bias = call
    if torch.is_grad_enabled() or torch.is_autocast_enabled(device):
        return False
    # Weights are read while the launch before is still running, which must not write them: the
    # weights that a run computes, from quantised ones for instance, are no parameters.
    if type(weight) is not torch.nn.Parameter:
        return False
    for tensor in (x, weight) if bias is None else (x, weight, bias):
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.is_inference():
            return False
        if tensor.layout is not torch.strided or tensor.dtype != x.dtype:
            return False
        if tensor.device != x.device or not tensor.numel():
            return False
    if x.device.type != device or not x.is_floating_point() or x.requires_grad:
        return False
    if weight.dim() != 2 or weight.stride(1) != 1 or x.shape[-1:] != weight.shape[1:]:
        return False
    return bias is None or (bias.shape == weight.shape[:1] and bias.is_contiguous())


def _factors(gate: torch.Tensor, up: torch.Tensor, activation: str) -> tuple[object, ...]:
    return id(gate), gate._version, id(up), up._version, activation


def _sources(group: _Group, x: torch.Tensor) -> tuple[object, ...]:
    """What changes when a tensor that goes into the results does, and the stream of the launch."""
    import torch

    tensors = [x, *group.weights, *(bias for bias in group.biases if bias is not None)]
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
    return stream, *((tensor._version, tensor.data_ptr()) for tensor in tensors)


def _heard(calls: _Record | _Service) -> AbstractContextManager[object]:
    """What hands calls of ``F.linear`` and of swiglu to ``calls``."""
    from torch.nn.functional import linear

    handlers: dict[Any, Handler] = {
        linear: lambda function, *given, **named: calls.linear(function, _Call(*given, **named))
    }
    if calls._swiglu is not None:
        handlers[calls._swiglu] = calls.swiglu
    return listening(handlers)
