"""The stacked experts of transformers 5."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hf_kernel_patch.recognition.known import Leaf, register
from hf_kernel_patch.recognition.modules import activation_of
from hf_kernel_patch.recognition.site import Site

if TYPE_CHECKING:
    import torch
    from torch import nn

# Since 5.18 the one-hot has a row more, for the index that expert parallelism gives to tokens of
# other ranks; before, only the grouped products of transformers knew that index.
_STACKED = """
def forward(self, hidden_states, top_k_index, top_k_weights):
    final_hidden_states = torch.zeros_like(hidden_states)
    with torch.no_grad():
        expert_mask = torch.nn.functional.one_hot(top_k_index, num_classes={classes})
        expert_mask = expert_mask.permute(2, 1, 0)
        expert_hit = torch.greater(expert_mask.sum(dim=(-1, -2)), 0).nonzero()
    for expert_idx in expert_hit:
        expert_idx = expert_idx[0]
        if expert_idx == self.num_experts:
            continue
        top_k_pos, token_idx = torch.where(expert_mask[expert_idx])
        current_state = hidden_states[token_idx]
        gate, up = nn.functional.linear(
            current_state, self.gate_up_proj[expert_idx]
        ).chunk(2, dim=-1)
        current_hidden_states = self.act_fn(gate) * up
        current_hidden_states = nn.functional.linear(
            current_hidden_states, self.down_proj[expert_idx]
        )
        current_hidden_states = (
            current_hidden_states * top_k_weights[token_idx, top_k_pos, None]
        )
        final_hidden_states.index_add_(
            0, token_idx, current_hidden_states.to(final_hidden_states.dtype)
        )
    return final_hidden_states
"""


def _stacked(site: Site) -> Callable[..., torch.Tensor]:
    original, moe = site.original, site.op

    def forward(
        self: nn.Module,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        tensors = hidden_states, top_k_index, top_k_weights
        asked = "" if site.explicit else asked_for(self)
        arguments, why_not = arguments_of(self, tensors, asked)
        if site.falls_back(*arguments, unless=why_not, module=self):
            return original(self, *tensors)
        return moe(*arguments)

    return forward


def arguments_of(
    experts: nn.Module, tensors: tuple[torch.Tensor, ...], why_not: str | None
) -> tuple[tuple[torch.Tensor, ...], str | None]:
    """The op's arguments for stacked experts, and why these are not the plain ones, or None.

    Nothing is read of experts that are not for us, for whatever reason.
    """
    why_not = why_not or why_not_plain(experts)
    if why_not:
        return (), why_not
    activation, why_not = activation_of(getattr(experts, "act_fn", None))
    return (*tensors, experts.gate_up_proj, experts.down_proj, activation), why_not


def asked_for(experts: nn.Module) -> str:
    """Whose experts the user has asked for, where they are neither the default's nor ours."""
    asked = implementation_of(experts)
    if asked in (None, "grouped_mm", NAME):
        return ""
    return f"experts_implementation={asked!r} was asked for"


def implementation_of(experts: nn.Module) -> Any:
    """The name of the implementation that transformers runs, None where it has no choice."""
    return getattr(getattr(experts, "config", None), "_experts_implementation", None)


def _reported(experts: nn.Module) -> str:
    """As ``asked_for``, for the report: transformers keeps no trace of an explicit default."""
    if implementation_of(experts) == "grouped_mm":
        return TAKEN
    return asked_for(experts)


def why_not_plain(experts: nn.Module) -> str | None:
    """Why these stacked experts are not the plain ones."""
    for name, plain in _PLAIN_LAYOUT.items():
        if getattr(experts, name, plain) != plain:
            return f"experts with {name}={not plain}"
    return why_not_default_gate(experts)


def why_not_default_gate(experts: nn.Module) -> str | None:
    """Why experts' gate is not that of transformers' grouped products, or None."""
    gate = vars(experts).get("_apply_gate") or getattr(type(experts), "_apply_gate", None)
    if gate is not None:
        from transformers.integrations import moe

        if gate is not getattr(moe, "_default_apply_gate", None):
            return "experts with an _apply_gate of their own"
    return None


#: What the report of one model says of the default, which "auto" takes the place of.
TAKEN = "in place of grouped_mm: whether it was asked for or is the default cannot be seen"
#: The name of ours among the implementations that transformers knows.
NAME = "hf_kernel_patch"
# Instance attributes of transformers 5 that describe the layout, with the values of this form.
_PLAIN_LAYOUT = {
    "is_transposed": False,
    "has_bias": False,
    "has_gate": True,
    "is_concatenated": True,
    "has_post_expert_norm": False,
}


register(
    Leaf(
        "moe.stacked",
        "moe",
        {
            _STACKED.format(classes=n): _stacked
            for n in ("self.num_experts", "self.num_experts + 1")
        },
        why_fallback=_reported,
    )
)
