"""Norms with a gate, after or before."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from hf_kernel_patch.recognition.known import Adapter, Leaf, register
from hf_kernel_patch.recognition.leaves.norms import texts
from hf_kernel_patch.recognition.leaves.norms.kernel_arguments import missing
from hf_kernel_patch.recognition.leaves.norms.plain import NO_WEIGHT
from hf_kernel_patch.recognition.site import Site

if TYPE_CHECKING:
    import torch
    from torch import nn

_NO_GATE = "there is no gate"


def _gated(site: Site) -> Callable[..., torch.Tensor]:
    serve = _rounded_first(site)

    def forward(
        self: nn.Module, hidden_states: torch.Tensor, gate: torch.Tensor | None = None
    ) -> torch.Tensor:
        return serve(self, hidden_states, gate, None if gate is not None else _NO_GATE)

    return forward


def _gated_by_name(site: Site) -> Callable[..., torch.Tensor]:
    serve = _rounded_first(site)

    def forward(
        self: nn.Module, hidden_states: torch.Tensor, gate: torch.Tensor | None
    ) -> torch.Tensor:
        name = self.activation
        fallback = None if name == "silu" else f"the gate's activation is {name}, not silu"
        return serve(self, hidden_states, gate, fallback)

    return forward


def _rounded_first(site: Site) -> Callable[..., torch.Tensor]:
    """(norm, hidden states, gate, why the op may not serve them) -> Llama's norm, gated."""
    original, rms_norm, lacks = site.original, site.op, missing(site, "gate")

    def serve(
        self: nn.Module,
        hidden_states: torch.Tensor,
        gate: torch.Tensor | None,
        fallback: str | None,
    ) -> torch.Tensor:
        weight = self.weight
        arguments = hidden_states, weight, self.variance_epsilon, 0.0, True, gate
        if weight is None:
            fallback = NO_WEIGHT
        if site.falls_back(*arguments, unless=lacks or fallback, module=self):
            return original(self, hidden_states, gate)
        return rms_norm(*arguments)

    return serve


def _gated_in_float32(site: Site) -> Callable[..., torch.Tensor]:
    original, rms_norm, lacks = site.original, site.op, missing(site, "activation")

    def forward(
        self: nn.Module, hidden_states: torch.Tensor, gate: torch.Tensor | None = None
    ) -> torch.Tensor:
        weight, name, fallback = self.weight, self.activation, lacks
        if gate is None or weight is None:
            fallback = _NO_GATE if gate is None else NO_WEIGHT
        elif name not in ("silu", "sigmoid"):
            fallback = f"the gate's activation is {name}, neither silu nor sigmoid"
        numbers = self.variance_epsilon, 0.0, False
        arguments = (hidden_states, weight, *numbers, gate, None, True, name)
        if site.falls_back(*arguments, unless=fallback, module=self):
            return original(self, hidden_states, gate)
        return rms_norm(*arguments)

    return forward


def _gate_first(in_groups: bool) -> Adapter:
    def adapter(site: Site) -> Callable[..., torch.Tensor]:
        original, rms_norm, lacks = site.original, site.op, missing(site, "norm_before_gate")

        def forward(
            self: nn.Module, hidden_states: torch.Tensor, gate: torch.Tensor | None = None
        ) -> torch.Tensor:
            group_size = self.group_size if in_groups else None
            numbers = self.variance_epsilon, 0.0, True
            weight = self.weight
            fallback = lacks if weight is not None else NO_WEIGHT
            arguments = (hidden_states, weight, *numbers, gate, group_size, False)
            if site.falls_back(*arguments, unless=fallback, module=self):
                return original(self, hidden_states, gate)
            return rms_norm(*arguments)

        return forward

    return adapter


LEAVES = {
    name: register(Leaf(name, "rms_norm", variants))
    for name, variants in (
        (
            "rms_norm.gated",
            {
                texts.GATED: _gated,
                texts.GATED_BY_NAME: _gated_by_name,
                texts.GATED_IN_FLOAT32: _gated_in_float32,
            },
        ),
        (
            "rms_norm.gate_first",
            {
                texts.GATE_FIRST: _gate_first(in_groups=False),
                texts.GATE_FIRST_IN_GROUPS: _gate_first(in_groups=True),
            },
        ),
    )
}
