"""What runs in place of an activation and its product."""

from __future__ import annotations

from collections.abc import Callable
from types import EllipsisType
from typing import TYPE_CHECKING, NamedTuple

from hf_kernel_patch.recognition.modules import activation_of
from hf_kernel_patch.recognition.site import Site

if TYPE_CHECKING:
    import torch
    from torch import nn

#: A module, or a function such as ``torch.nn.functional.silu``.
Activation = Callable[..., "torch.Tensor"]


class _Kept(NamedTuple):
    """An activation that is not computed yet: its input, and what is to be computed of it."""

    gate: torch.Tensor
    name: str
    activation: Activation
    approximate: str | None


def serve(site: Site) -> Callable[..., torch.Tensor | _Kept]:
    """(module, activation, gate, up) -> activation(gate) * up.

    A rewritten function calls it twice where the activation has a name: at first without ``up``,
    for activation(gate) or what will be needed to compute it; then without an activation, and
    ``gate`` is what the first call gave. ``...`` stands for an argument that is not given.
    """
    import torch

    tensor = torch.Tensor
    op: Callable[..., torch.Tensor] = site.op

    def gated_product(
        module: nn.Module,
        activation: Activation | EllipsisType,
        gate: torch.Tensor | _Kept,
        up: torch.Tensor | EllipsisType = ...,
        approximate: str | None = None,
    ) -> torch.Tensor | _Kept:
        if activation is not ...:
            name, fallback = activation_of(activation, approximate)
            if up is ...:
                if fallback is None and site.in_force(module):
                    return _Kept(gate, name, activation, approximate)
                site.falls_back(unless=fallback, module=module)
                return _activated(activation, gate, approximate)
        elif type(gate) is _Kept:
            gate, name, activation, approximate = gate
            fallback = None
        else:
            return gate * up  # type: ignore[operator]
        if not (isinstance(gate, tensor) and isinstance(up, tensor)):
            fallback = "a factor is no tensor"
        if site.falls_back(gate, up, name, unless=fallback, module=module):
            return _activated(activation, gate, approximate) * up
        return op(gate, up, name)

    return gated_product


def _activated(activation: Activation, gate: torch.Tensor, approximate: str | None) -> torch.Tensor:
    if approximate is None:
        return activation(gate)
    return activation(gate, approximate=approximate)
