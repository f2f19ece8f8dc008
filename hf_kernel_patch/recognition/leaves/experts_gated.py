"""Stacked experts of transformers 5 with a gate of their own, biases or transposed weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from hf_kernel_patch.ops.moe import OWN_GATE
from hf_kernel_patch.recognition.known import Adapter, Leaf, register
from hf_kernel_patch.recognition.leaves import experts_gated_code as code
from hf_kernel_patch.recognition.leaves.experts import (
    asked_for,
    implementation_of,
    why_not_default_gate,
)
from hf_kernel_patch.recognition.site import Site

if TYPE_CHECKING:
    import torch
    from torch import nn


class _Layout(NamedTuple):
    """What the code of some experts computes.

    Attributes:
        gate: the attribute that stands between their products.
        first: the attribute with the weights of the first product.
        default: whether the gate has to be the default one, since the loop has it written out.
        biased, transposed, normed: whether there are biases, the weights are (E, in, out), and
            ``post_expert_norm`` follows.
        wide: whether the loop computes in float32, whatever the weights are in.
    """

    gate: str = "_apply_gate"
    first: str = "gate_up_proj"
    default: bool = False
    biased: bool = False
    transposed: bool = False
    normed: bool = False
    wide: bool = False

    @property
    def attributes(self) -> dict[str, bool]:
        """What instances of transformers say of it."""
        return {
            "has_gate": self.first == "gate_up_proj",
            "has_bias": self.biased,
            "is_transposed": self.transposed,
            "has_post_expert_norm": self.normed,
        }

    def weights(self, experts: nn.Module) -> tuple[torch.Tensor, ...]:
        """The op's arguments after the tensors."""
        from hf_kernel_patch.ops.moe.reference import Gating

        gating = Gating(
            getattr(experts, self.gate),
            getattr(experts, f"{self.first}_bias") if self.biased else None,
            experts.down_proj_bias if self.biased else None,
            self.transposed,
            experts.post_expert_norm if self.normed else None,
        )
        return getattr(experts, self.first), experts.down_proj, gating


def _forward(site: Site, layout: _Layout) -> Callable[..., torch.Tensor]:
    """(experts, tensors) -> what the experts give."""
    original, moe = site.original, site.op
    attributes = layout.attributes
    takes_gating = getattr(site.kernel, "takes_gating", False)

    def why_not_these(experts: nn.Module, tensors: tuple[torch.Tensor, ...]) -> str | None:
        if not site.explicit and (reason := _left(experts)):
            return reason
        if not takes_gating:
            return OWN_GATE
        if any(tensor is None for tensor in tensors):
            return "there are no routes"
        for name, plain in attributes.items():
            if getattr(experts, name, plain) != plain:
                return f"experts with {name}={not plain}"
        if layout.wide and implementation_of(experts) == "eager" and tensors[0].element_size() < 4:
            return "the original computes in float32"
        return why_not_default_gate(experts) if layout.default else None

    def forward(experts: nn.Module, tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
        why_not = why_not_these(experts, tensors)
        arguments = () if why_not else (*tensors, *layout.weights(experts))
        if site.falls_back(*arguments, unless=why_not, module=experts):
            return original(experts, *tensors)
        return moe(*arguments)

    return forward


def _left(experts: nn.Module) -> str:
    """Why "auto" leaves experts as they are now to the original."""
    if implementation_of(experts) == "grouped_mm":
        return "not measured to be faster than grouped_mm"
    return asked_for(experts)


def _chosen(**layout: Any) -> Adapter:
    def adapter(site: Site) -> Callable[..., torch.Tensor]:
        run = _forward(site, _Layout(**layout))

        def forward(
            self: nn.Module,
            hidden_states: torch.Tensor,
            top_k_index: torch.Tensor,
            top_k_weights: torch.Tensor,
        ) -> torch.Tensor:
            return run(self, (hidden_states, top_k_index, top_k_weights))

        return forward

    return adapter


def _routed(**layout: Any) -> Adapter:
    def adapter(site: Site) -> Callable[..., torch.Tensor]:
        run = _forward(site, _Layout(**layout))

        def forward(
            self: nn.Module,
            hidden_states: torch.Tensor,
            router_indices: torch.Tensor | None = None,
            routing_weights: torch.Tensor | None = None,
        ) -> torch.Tensor:
            return run(self, (hidden_states, router_indices, routing_weights))

        return forward

    return adapter


_CLASSES = ("self.num_experts", "self.num_experts + 1")

register(
    Leaf(
        "moe.gated",
        "moe",
        {
            **{code.APPLIED.format(classes=n): _chosen() for n in _CLASSES},
            **{
                code.UNGATED.format(classes=n): _chosen(gate="act_fn", first="up_proj")
                for n in _CLASSES
            },
            code.SUMMED_IN_FLOAT32: _chosen(),
            code.TRANSPOSED: _chosen(default=True, transposed=True),
            code.NORMED: _chosen(default=True, normed=True),
            code.BIASED: _routed(biased=True, transposed=True),
            code.IN_FLOAT32: _routed(biased=True, transposed=True, wide=True),
        },
        why_fallback=_left,
    )
)
