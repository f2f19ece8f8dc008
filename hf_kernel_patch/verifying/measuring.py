"""Running a module, or a whole model, once: what it gives, and the gradients."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

from hf_kernel_patch.verifying.finding import whole_parts
from hf_kernel_patch.verifying.keeping import forget_graphs
from hf_kernel_patch.verifying.steering import Choices, steered

if TYPE_CHECKING:
    import torch
    from torch import nn

Tensors = dict[str, "torch.Tensor"]
Cast = Callable[["torch.Tensor"], "torch.Tensor"]


@dataclass
class Call:
    """What a module was called with, and what the models inside of it gave."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, Any] = field(default_factory=dict)


@dataclass
class Result:
    """What a run gave: its floating outputs, and the gradients by name, None for those it lacks."""

    outputs: Tensors
    gradients: dict[str, torch.Tensor | None]


class Trials:
    """The runs of one module on one call: the first one says which cotangents and choices all take.

    Args:
        module: whose forward is run, and its own parameters' gradients taken.
        call: what it is given.
    """

    def __init__(self, module: nn.Module, call: Call, seed: int = 0):
        self.module, self.call = module, call
        self._choices, self._seed = Choices(), seed
        self._cotangents: Tensors | None = None

    def run(self) -> Result:
        """The module as it is now, patched or not."""
        with _replayed(self.module, self.call.parts) as (leaves, replay):
            replay(_as_it_is)
            return self._run(self.module, leaves, _as_it_is)

    def truth(self) -> Result:
        """A copy of the module in float64. Only while nothing is patched."""
        import torch

        weight = next(self.module.parameters(), None)
        device = None if weight is None else device_for_double(weight.device)

        def cast(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, torch.float64 if tensor.is_floating_point() else tensor.dtype)

        with _replayed(self.module, self.call.parts):
            copied = double_of(self.module, device)
        with _replayed(copied, self.call.parts, self.module) as (leaves, replay):
            replay(cast)
            return self._run(copied, leaves, cast)

    def _run(self, module: nn.Module, leaves: Tensors, cast: Cast) -> Result:
        import torch

        args, kwargs = _as_leaves(self.call, _names(module, self.call), leaves, cast)
        own = {name: one for name, one in module.named_parameters() if one.requires_grad}
        torch.manual_seed(self._seed)
        forget_graphs(module)
        with steered(self._choices, wide=cast is not _as_it_is):
            outputs = flattened(module(*args, **kwargs))
            targets = {name: one for name, one in outputs.items() if one.requires_grad}
            if "loss" in targets:  # a training step
                targets = {"loss": targets["loss"]}
            gradients = self._backward(targets, {**leaves, **own})
        return Result({name: one.detach() for name, one in outputs.items()}, gradients)

    def _backward(self, targets: Tensors, by: Tensors) -> dict[str, torch.Tensor | None]:
        import torch

        if self._cotangents is None:
            generator = torch.Generator().manual_seed(self._seed)
            self._cotangents = {
                name: torch.ones_like(one)
                if one.numel() == 1
                else torch.randn(one.shape, generator=generator).to(one)
                for name, one in targets.items()
            }
        wanted = [name for name in self._cotangents if name in targets]
        if not wanted or not by:
            return {}
        found = torch.autograd.grad(
            [targets[name] for name in wanted],
            list(by.values()),
            [self._cotangents[name].to(targets[name]) for name in wanted],
            allow_unused=True,
        )
        return dict(zip(by, found, strict=True))


def flattened(output: Any, name: str = "output") -> Tensors:
    """The floating tensors of an output, by the names of its fields or by their places."""
    import torch

    if isinstance(output, torch.Tensor):
        return {name: output} if output.is_floating_point() else {}
    if isinstance(output, Mapping):
        # By the keys: logits that wait to be read are read so.
        named = {str(key): output[key] for key in output.keys()}  # noqa: SIM118
    elif isinstance(output, tuple | list):
        named = {f"{name}[{place}]": value for place, value in enumerate(output)}
    else:
        return {}
    return {key: one for own, value in named.items() for key, one in flattened(value, own).items()}


def calls(modules: Mapping[str, nn.Module], forward: Callable[[], object]) -> dict[str, Call]:
    """Path -> what each module is called with the first time in a forward.

    The forward runs with gradients enabled, so that it is known which inputs have one, but keeps
    nothing for a backward.
    """
    import torch
    from torch.utils._pytree import tree_map_only

    found: dict[str, Call] = {}
    known: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def copied(value: torch.Tensor) -> torch.Tensor:
        key = id(value), value._version
        if key not in known:  # a mask is the same for all layers
            clone = value.detach().clone()
            known[key] = value, clone.requires_grad_(value.requires_grad)
        return known[key][1]

    def keep(value: Any) -> Any:
        return tree_map_only(torch.Tensor, copied, value)

    def before(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            found.setdefault(path, Call(keep(args), keep(kwargs)))

        return hook

    def after(path: str, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if path in found:
                found[path].parts.setdefault(name, keep(output))

        return hook

    handles = []
    try:
        for path, module in modules.items():
            handles.append(module.register_forward_pre_hook(before(path), with_kwargs=True))
            for name, child in whole_parts(module).items():
                handles.append(child.register_forward_hook(after(path, name)))
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, lambda kept: kept):
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return found


def device_for_double(device: torch.device) -> str | None:
    """Where float64 is computed for a device: None for itself."""
    return None if device.type in ("cpu", "cuda", "xpu") else "cpu"


def double_of(module: nn.Module, device: str | None = None) -> nn.Module:
    """A copy in float64 that runs by code that takes float64, on a device or on the module's."""
    import torch

    # A module may keep tensors as plain attributes, also such of an earlier call and its graph.
    held = [one for part in module.modules() for one in vars(part).values()]
    tensors = [one for one in held if type(one) is torch.Tensor and one.is_floating_point()]
    wide = {id(one): one.detach().to(device, torch.float64) for one in tensors}
    copied = copy.deepcopy(module, wide)
    copied = (copied if device is None else copied.to(device)).double()
    for one in copied.modules():
        config: Any = getattr(one, "config", None)
        if hasattr(config, "_experts_implementation"):
            config._experts_implementation = "eager"
        if "flash" in str(getattr(config, "_attn_implementation", "")):
            config._attn_implementation = "sdpa"
    return copied


def _names(module: nn.Module, call: Call) -> list[str]:
    try:
        known = list(inspect.signature(module.forward).parameters)
    except (TypeError, ValueError):
        known = []
    return [*known, *(f"argument {place}" for place in range(len(known), len(call.args)))]


def _as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _as_leaves(
    call: Call, names: list[str], leaves: Tensors, cast: Cast
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments, where those that have a gradient come from leaves, which are added."""
    args = tuple(_given(name, value, leaves, cast) for name, value in zip(names, call.args))
    return args, {name: _given(name, value, leaves, cast) for name, value in call.kwargs.items()}


def _given(name: str, value: Any, leaves: Tensors, cast: Cast) -> Any:
    """A value to call with, whose tensors may be written to."""
    import torch
    from torch.utils._pytree import tree_map_only

    def leaf(tensor: torch.Tensor) -> torch.Tensor:
        made = cast(tensor.detach())
        if not tensor.is_floating_point():
            return made
        made = made.clone() if made.data_ptr() == tensor.data_ptr() else made
        if not tensor.requires_grad:
            return made
        own = name if name not in leaves else f"{name}[{len(leaves)}]"
        leaves[own] = made.requires_grad_()
        return made.clone()

    return tree_map_only(torch.Tensor, leaf, value)


@contextmanager
def _replayed(
    module: nn.Module, parts: Mapping[str, Any], original: nn.Module | None = None
) -> Iterator[tuple[Tensors, Callable[[Cast], None]]]:
    """Models inside of a module stand aside; ``replay`` has others give what they gave.

    It is told how tensors are cast. The leaves of what is given are in the dictionary. A copy whose
    parts are no models has those of the original in their place.
    """
    import torch

    leaves: Tensors = {}
    before = {name: module._modules[name] for name in parts}
    held = (original or module)._modules
    models = {name: held[name] for name in parts}

    def replay(cast: Cast) -> None:
        for name, output in parts.items():
            given = _given(f"output of {name}", output, leaves, cast)
            module._modules[name] = _stand_in()(models[name], given)

    try:
        for name in parts:
            module._modules[name] = torch.nn.Identity()
        yield leaves, replay
    finally:
        module._modules.update(before)


@cache
def _stand_in() -> Any:
    from torch import nn

    class StandIn(nn.Module):
        """Gives what a model gave, and has its attributes."""

        def __init__(self, model: nn.Module, output: Any):
            super().__init__()
            self.__dict__["_model"], self.__dict__["_output"] = model, output

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self._output

        def __getattr__(self, name: str) -> Any:
            return getattr(vars(self)["_model"], name)

    return StandIn
