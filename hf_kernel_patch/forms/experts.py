"""Mixture of experts: the stacked experts of transformers 5 and the lists of experts of 4."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hf_kernel_patch.forms.activation import activation_of, touched
from hf_kernel_patch.forms.form import Adapter, Form, register_form
from hf_kernel_patch.forms.site import Site

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

_ROUTED = """
def forward(self, hidden_states):
    batch_size, sequence_length, hidden_dim = hidden_states.shape
{jitter}
    hidden_states = hidden_states.view(-1, hidden_dim)
    router_logits = self.gate(hidden_states)
    routing_weights = F.softmax(router_logits, dim=1, dtype=torch.float)
    routing_weights, selected_experts = torch.topk(routing_weights, self.top_k, dim=-1)
{renormalise}
    routing_weights = routing_weights.to(hidden_states.dtype)
    final_hidden_states = torch.zeros(
        (batch_size * sequence_length, hidden_dim),
        dtype=hidden_states.dtype,
        device=hidden_states.device,
    )
    expert_mask = torch.nn.functional.one_hot(
        selected_experts, num_classes=self.num_experts
    ).permute(2, 1, 0)
    expert_hit = torch.greater(expert_mask.sum(dim=(-1, -2)), 0).nonzero()
    for expert_idx in expert_hit:
        expert_layer = self.experts[expert_idx]
        idx, top_x = torch.where(expert_mask[expert_idx].squeeze(0))
        current_state = hidden_states[None, top_x].reshape(-1, hidden_dim)
        current_hidden_states = expert_layer(current_state) * routing_weights[top_x, idx, None]
        final_hidden_states.index_add_(
            0, top_x, current_hidden_states.to(hidden_states.dtype)
        )
{shared}
    final_hidden_states = final_hidden_states.reshape(batch_size, sequence_length, hidden_dim)
    return final_hidden_states, router_logits
"""
_CHOSEN = """
def moe(self, hidden_states, topk_indices, topk_weights):
    final_hidden_states = torch.zeros_like(hidden_states, dtype=topk_weights.dtype)
    expert_mask = torch.nn.functional.one_hot(topk_indices, num_classes=len(self.experts))
    expert_mask = expert_mask.permute(2, 0, 1)
    for expert_idx in range(len(self.experts)):
        expert = self.experts[expert_idx]
        mask = expert_mask[expert_idx]
        token_indices, weight_indices = torch.where(mask)
        if token_indices.numel() > 0:
            expert_weights = topk_weights[token_indices, weight_indices]
            expert_input = hidden_states[token_indices]
            expert_output = expert(expert_input)
            weighted_output = expert_output * expert_weights.unsqueeze(-1)
            final_hidden_states.index_add_(0, token_indices, weighted_output)
    return final_hidden_states.type(hidden_states.dtype)
"""
_JITTER = """
    if self.training and self.jitter_noise > 0:
        hidden_states *= torch.empty_like(hidden_states).uniform_(
            1.0 - self.jitter_noise, 1.0 + self.jitter_noise
        )
"""
_ALWAYS = "    routing_weights /= routing_weights.sum(dim=-1, keepdim=True)"
_IF_ASKED = f"    if self.norm_topk_prob:\n    {_ALWAYS}"
_SHARED = """
    shared_expert_output = self.shared_expert(hidden_states)
    shared_expert_output = (
        F.sigmoid(self.shared_expert_gate(hidden_states)) * shared_expert_output
    )
    final_hidden_states = final_hidden_states + shared_expert_output
"""


def _stacked(site: Site) -> Callable[..., Any]:
    original, moe = site.original, site.op

    def forward(self: Any, hidden_states: Any, top_k_index: Any, top_k_weights: Any) -> Any:
        tensors = hidden_states, top_k_index, top_k_weights
        why_not = None if site.explicit else _asked_for(self)
        arguments, why_not = arguments_of(self, tensors, why_not)
        if site.declines(*arguments, unless=why_not):
            return original(self, *tensors)
        return moe(*arguments)

    return forward


def arguments_of(
    experts: Any, tensors: tuple[Any, ...], why_not: str | None
) -> tuple[tuple[Any, ...], str | None]:
    """The op's arguments for stacked experts, and why these are not the plain ones, or None.

    Nothing is read of experts that are not for us, for whatever reason.
    """
    why_not = why_not or _why_not_plain(experts)
    if why_not:
        return (), why_not
    activation, why_not = activation_of(experts.act_fn)
    return (*tensors, experts.gate_up_proj, experts.down_proj, activation), why_not


def _asked_for(experts: Any) -> str | None:
    """Whose experts the user has asked for, where they are neither the default's nor ours."""
    asked = getattr(experts.config, "_experts_implementation", None)
    if asked in (None, "grouped_mm", NAME):
        return None
    return f"experts_implementation={asked!r} was asked for"


def _why_not_plain(experts: Any) -> str | None:
    """Why these stacked experts are not the plain ones."""
    for name, plain in _PLAIN_LAYOUT.items():
        if getattr(experts, name, plain) != plain:
            return f"experts with {name}={not plain}"
    return None


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


def _routed(site: Site) -> Callable[..., Any]:
    """A block of transformers 4: router, list of experts and, in Qwen2-MoE, a shared expert."""
    original, moe = site.original, site.op

    def forward(self: Any, hidden_states: Any) -> Any:
        import torch
        from torch.nn import functional as F

        gate_up, down, activation, why_not = _listed(self.experts)
        if site.declines(hidden_states, None, None, gate_up, down, activation, unless=why_not):
            return original(self, hidden_states)
        if self.training and getattr(self, "jitter_noise", 0) > 0:
            low, high = 1.0 - self.jitter_noise, 1.0 + self.jitter_noise
            hidden_states *= torch.empty_like(hidden_states).uniform_(low, high)
        tokens = hidden_states.view(-1, hidden_states.shape[-1])
        router_logits = self.gate(tokens)
        weights = F.softmax(router_logits, dim=1, dtype=torch.float)
        weights, index = torch.topk(weights, self.top_k, dim=-1)
        if getattr(self, "norm_topk_prob", True):
            weights = weights / weights.sum(dim=-1, keepdim=True)
        weights = weights.to(tokens.dtype)
        output = moe(tokens, index, weights, gate_up, down, activation)
        if hasattr(self, "shared_expert"):
            output = output + F.sigmoid(self.shared_expert_gate(tokens)) * self.shared_expert(
                tokens
            )
        return output.reshape(hidden_states.shape), router_logits

    return forward


def _chosen(site: Site) -> Callable[..., Any]:
    """The experts of a block of DeepSeek-V3's kind in transformers 4."""
    original, op = site.original, site.op

    def moe(self: Any, hidden_states: Any, topk_indices: Any, topk_weights: Any) -> Any:
        gate_up, down, activation, why_not = _listed(self.experts)
        arguments = hidden_states, topk_indices, topk_weights, gate_up, down, activation
        if site.declines(*arguments, unless=why_not):
            return original(self, hidden_states, topk_indices, topk_weights)
        return op(*arguments)

    return moe


def _listed(experts: Any) -> tuple[list[Any], list[Any], str, str | None]:
    """(gate, up) and down weights of a list of experts, their activation, or why they don't fit."""
    from torch import nn

    activation, why_not = activation_of(getattr(experts[0], "act_fn", None))
    names = ("w1", "w3", "w2") if hasattr(experts[0], "w1") else _GATE_UP_DOWN
    gate_up, down = [], []
    for expert in experts:
        parts = [expert._modules.get(name) for name in names]
        if touched(expert) or any(
            type(part) is not nn.Linear
            or part.bias is not None
            or type(part.weight) is not nn.Parameter
            or touched(part)
            for part in parts
        ):
            why_not = why_not or "an expert is wrapped, hooked or has a bias"
            break
        gate, up, last = (part._parameters["weight"] for part in parts)
        gate_up.append((gate, up))
        down.append(last)
    return gate_up, down, activation, why_not


_GATE_UP_DOWN = ("gate_proj", "up_proj", "down_proj")


def _block(name: str, jitter: str = "", renormalise: str = _IF_ASKED, shared: str = "") -> None:
    source = _ROUTED.format(jitter=jitter, renormalise=renormalise, shared=shared)
    variants: dict[str, Adapter] = {source: _routed}
    register_form(Form(name, "moe", variants))


register_form(
    Form(
        "moe.stacked",
        "moe",
        {
            _STACKED.format(classes=n): _stacked
            for n in ("self.num_experts", "self.num_experts + 1")
        },
    )
)
register_form(Form("moe.list_chosen", "moe", {_CHOSEN: _chosen}))
_block("moe.list")
_block("moe.list_shared", shared=_SHARED)
_block("moe.list_jitter", jitter=_JITTER, renormalise=_ALWAYS)
