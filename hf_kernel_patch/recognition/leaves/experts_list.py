"""The lists of experts of transformers 4, and the blocks that route tokens to them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING

from hf_kernel_patch.recognition.known import Adapter, Leaf, register
from hf_kernel_patch.recognition.modules import activation_of, hooked, hooked_everywhere
from hf_kernel_patch.recognition.site import Site
from hf_kernel_patch.recognition.source import canonical, fingerprint, innermost

if TYPE_CHECKING:
    import torch
    from torch import nn

#: An expert, and what its projections are called.
_EXPERTS = {
    """
def forward(self, x):
    down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return down_proj
""": ("gate_proj", "up_proj", "down_proj"),
    """
def forward(self, x):
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
""": ("gate_proj", "up_proj", "down_proj"),
    """
def forward(self, hidden_states):
    current_hidden_states = self.act_fn(self.w1(hidden_states)) * self.w3(hidden_states)
    current_hidden_states = self.w2(current_hidden_states)
    return current_hidden_states
""": ("w1", "w3", "w2"),
}
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


def _routed(site: Site) -> Callable[..., torch.Tensor]:
    """A block of transformers 4: router, list of experts and, in Qwen2-MoE, a shared expert."""
    original, moe = site.original, site.op

    def forward(self: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
        import torch
        from torch.nn import functional as F

        gate_up, down, activation, why_not = _listed(self.experts)
        if site.falls_back(
            hidden_states, None, None, gate_up, down, activation, unless=why_not, module=self
        ):
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


def _chosen(site: Site) -> Callable[..., torch.Tensor]:
    """The experts of a block of DeepSeek-V3's kind in transformers 4."""
    original, op = site.original, site.op

    def moe(
        self: nn.Module,
        hidden_states: torch.Tensor,
        topk_indices: torch.Tensor,
        topk_weights: torch.Tensor,
    ) -> torch.Tensor:
        gate_up, down, activation, why_not = _listed(self.experts)
        arguments = hidden_states, topk_indices, topk_weights, gate_up, down, activation
        if site.falls_back(*arguments, unless=why_not, module=self):
            return original(self, hidden_states, topk_indices, topk_weights)
        return op(*arguments)

    return moe


def _listed(experts: nn.Module) -> tuple[list[torch.Tensor], list[torch.Tensor], str, str | None]:
    """(gate, up) and down weights of a list of experts, their activation, or why they don't fit."""
    from torch import nn

    gate_up: list[torch.Tensor] = []
    down: list[torch.Tensor] = []
    names: tuple[str, ...] = ()
    forward, activation, sizes = None, "", None
    if hooked_everywhere():
        return [], [], "", "a hook on all modules needs the original"
    for expert in experts:
        if type(expert).forward is not forward:
            forward = type(expert).forward
            names = _names_of(forward)
        found, why_not = activation_of(expert._modules.get("act_fn"))
        parts = [expert._modules.get(name) for name in names]
        if (
            not parts
            or hooked(expert)
            or any(
                type(part) is not nn.Linear
                or part.bias is not None
                or type(part.weight) is not nn.Parameter
                or hooked(part)
                for part in parts
            )
        ):
            return [], [], "", why_not or "an expert is wrapped, hooked or has a bias"
        weights = [part._parameters["weight"] for part in parts]
        if any(weight._backward_hooks or weight._post_accumulate_grad_hooks for weight in weights):
            why_not = why_not or "a hook on an expert's weight"
        shapes = [weight.shape for weight in weights]
        activation, sizes = activation or found, sizes or shapes
        if found != activation or shapes != sizes:
            why_not = why_not or "the experts differ in activation or size"
        if why_not:
            return [], [], "", why_not
        gate_up.append((weights[0], weights[1]))
        down.append(weights[2])
    return gate_up, down, activation, None


def _names_of(forward: object) -> tuple[str, ...]:
    """The names of gate, up and down in an expert of this forward; none if it is no plain MLP."""
    function = innermost(forward)
    found = fingerprint(function) if inspect.isfunction(function) else None
    return next((names for source, names in _EXPERTS.items() if canonical(source) == found), ())


# As torch.compiler.assume_constant_result does: torch.compile is not to trace the look-up.
_names_of._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _block(name: str, jitter: str = "", renormalise: str = _IF_ASKED, shared: str = "") -> None:
    source = _ROUTED.format(jitter=jitter, renormalise=renormalise, shared=shared)
    variants: dict[str, Adapter] = {source: _routed}
    register(Leaf(name, "moe", variants))


register(Leaf("moe.list_chosen", "moe", {_CHOSEN: _chosen}))
_block("moe.list")
_block("moe.list_shared", shared=_SHARED)
_block("moe.list_jitter", jitter=_JITTER, renormalise=_ALWAYS)
