"""Our experts under a name of their own in transformers' interface, for any model to ask for.

``from_pretrained(..., experts_implementation="hf_kernel_patch")`` takes them (from transformers
5.7 on), whether or not anything is patched. The name stays: without it a loaded model would fail.
"""

from __future__ import annotations

import sys
from importlib.machinery import PathFinder
from typing import TYPE_CHECKING, Any

from hf_kernel_patch import registry, settings
from hf_kernel_patch.errors import warn
from hf_kernel_patch.recognition.leaves.experts import NAME, arguments_of
from hf_kernel_patch.recognition.site import Site

if TYPE_CHECKING:
    from types import ModuleType

    import torch
    from torch import nn

_site: Site | str | None = None


def register() -> None:
    """Enter the name in transformers' interfaces when they are imported, or now."""
    for name in _INTERFACES:
        if (module := sys.modules.get(name)) is not None:
            _enter(module)
    waiting = any(name not in sys.modules for name in _INTERFACES)
    if waiting and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder:
    """Finds the interfaces' modules where they are, and enters the name once they have run.

    wrapt's hooks would do it too, but take longer to import than this whole package.
    """

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        spec = PathFinder.find_spec(name, path, target) if name in _INTERFACES else None
        if spec is None or spec.loader is None:
            return None
        loader: Any = spec.loader
        run = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            _enter(module)

        loader.exec_module = exec_module
        return spec


def _enter(module: ModuleType) -> None:
    interface, forward = _INTERFACES[module.__name__]
    if hasattr(module, interface):
        getattr(module, interface)[NAME] = forward


def experts_forward(
    self: nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Stacked experts by this device's kernel; what it cannot serve, by transformers' default.

    Each reason for that is told once in a warning.
    """
    tensors = hidden_states, top_k_index, top_k_weights
    _look_up()
    site = _site
    arguments, why_not = arguments_of(self, tensors, site if isinstance(site, str) else None)
    if isinstance(site, Site):
        why_not = why_not or site.why_fallback(*arguments) or site.kernel.why_fallback(*arguments)
        if why_not is None:
            return site.op(*arguments)
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    return _by_default(ALL_EXPERTS_FUNCTIONS, self, tensors, why_not)


def fp8_experts_forward(
    self: nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Experts in FP8, which have an interface of their own, by its default; it is told once."""
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS

    tensors = hidden_states, top_k_index, top_k_weights
    return _by_default(ALL_FP8_EXPERTS_FUNCTIONS, self, tensors, "experts in FP8")


def _by_default(
    functions: Any, experts: nn.Module, tensors: tuple[torch.Tensor, ...], why_not: str | None
) -> torch.Tensor:
    """What the interface's default gives, after a warning."""
    import torch

    if not torch.compiler.is_compiling():
        message = f"{type(experts).__name__} runs by transformers' default: {why_not}"
        warn(message)
    return functions["grouped_mm"](experts, *tensors)


#: Module of transformers -> its interface, if its version has one, and what takes our name there.
_INTERFACES = {
    "transformers.integrations.moe": ("ALL_EXPERTS_FUNCTIONS", experts_forward),
    "transformers.integrations.finegrained_fp8": ("ALL_FP8_EXPERTS_FUNCTIONS", fp8_experts_forward),
}


def _look_up() -> bool:
    """Find this device's kernel, or why there is none, once.

    The True is what torch.compile needs to take a call for a constant.
    """
    global _site
    if _site is not None:
        return True
    kernel = registry.defaults().get("moe")
    if settings.disabled():
        _site = "HF_KERNEL_PATCH_DISABLE is set"
    elif kernel is None:
        _site = "no default kernel for this device"
    else:
        _site = Site(kernel, None, explicit=True)
    return True


# As torch.compiler.assume_constant_result does: torch.compile is not to trace the look-up.
_look_up._dynamo_marked_constant = True  # type: ignore[attr-defined]
