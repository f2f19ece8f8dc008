"""The state of a model in which it can be compared with itself, and that it is given back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from hf_kernel_patch.errors import KernelPatchError
from hf_kernel_patch.workload import seeded
from hf_kernel_patch.workload.keeping import modules_kept

if TYPE_CHECKING:
    from torch import nn

#: Parts of the names of what makes a forward random: dropout, layers that are dropped, jitter.
_RANDOM = ("drop", "jitter")
#: Keys are not cached: a module that is run again would add to them.
_UNCACHED = "use_cache", False
#: Class names of wrappers that hold a model as ``module`` and add no computation.
_WRAPPERS = ("DistributedDataParallel", "DataParallel")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of what torch.compile and data parallel training put around it."""
    inner: Any = getattr(model, "_orig_mod", None)
    if inner is None and type(model).__name__ in _WRAPPERS:
        inner = model.module
    return model if inner is None else unwrapped(inner)


def require_weights(model: nn.Module) -> None:
    """KernelPatchError where a model is empty or its weights are nowhere."""
    weights = list(model.parameters())
    if not weights:
        raise KernelPatchError("this model has no weights")
    if all(one.is_meta for one in weights):
        raise KernelPatchError("this model is on the meta device: it has no weights to run with")


@contextmanager
def kept(model: nn.Module, train: bool) -> Iterator[None]:
    """Run a model without anything random, in training mode or not; all is put back afterwards.

    Recomputed activations and compiled graphs are switched off: neither changes what a site
    computes. Gradients are never written to ``.grad``.
    """
    import torch

    with ExitStack() as stack:
        stack.enter_context(seeded(0))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(modules_kept(model))
        for module in model.modules():
            _replace(stack, vars(module), "gradient_checkpointing", False)
            _replace(stack, vars(module), "_compiled_call_impl", None)
            for holder in (module, getattr(module, "config", None)):
                _calm(stack, getattr(holder, "__dict__", {}))
            _replace(stack, getattr(getattr(module, "config", None), "__dict__", {}), *_UNCACHED)
        model.train(train)
        yield


def forget_graphs(model: nn.Module) -> None:
    """Cut off what modules have kept of an earlier call: its graph is gone."""
    import torch

    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                vars(module)[name] = value.detach()


def _calm(stack: ExitStack, values: dict[str, Any]) -> None:
    for name, value in list(values.items()):
        if isinstance(value, float) and value and any(part in name for part in _RANDOM):
            _replace(stack, values, name, 0.0)
    # The probability of torch's own modules.
    if isinstance(values.get("p"), float) and "inplace" in values:
        _replace(stack, values, "p", 0.0)


def _replace(stack: ExitStack, values: dict[str, Any], name: str, value: object) -> None:
    if name in values:
        stack.callback(values.__setitem__, name, values[name])
        values[name] = value
