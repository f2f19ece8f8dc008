"""The code of stacked experts with a gate of their own, biases or transposed weights."""

from __future__ import annotations

# DeepSeek-V4 and others.
APPLIED = """
def forward(self, hidden_states, top_k_index, top_k_weights):
    final = torch.zeros_like(hidden_states)
    with torch.no_grad():
        mask = F.one_hot(top_k_index, num_classes={classes}).permute(2, 1, 0)
        hit = torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero()
    for expert_idx in hit:
        expert_idx = expert_idx[0]
        if expert_idx == self.num_experts:
            continue
        top_k_pos, token_idx = torch.where(mask[expert_idx])
        current = self._apply_gate(
            F.linear(hidden_states[token_idx], self.gate_up_proj[expert_idx])
        )
        current = (
            F.linear(current, self.down_proj[expert_idx])
            * top_k_weights[token_idx, top_k_pos, None]
        )
        final.index_add_(0, token_idx, current.to(final.dtype))
    return final
"""
# Inkling2.
SUMMED_IN_FLOAT32 = """
def forward(self, hidden_states, top_k_index, top_k_weights):
    final = torch.zeros_like(hidden_states, dtype=torch.float32)
    with torch.no_grad():
        mask = F.one_hot(top_k_index, num_classes=self.num_experts + 1).permute(2, 1, 0)
        hit = torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero()
    for expert_idx in hit:
        expert_idx = expert_idx[0]
        if expert_idx == self.num_experts:
            continue
        top_k_pos, token_idx = torch.where(mask[expert_idx])
        current = hidden_states[token_idx]
        out = self._apply_gate(F.linear(current, self.gate_up_proj[expert_idx]))
        out = F.linear(out, self.down_proj[expert_idx])
        out = out * top_k_weights[token_idx, top_k_pos, None]
        final.index_add_(0, token_idx, out.to(final.dtype))
    return final.to(hidden_states.dtype)
"""
# GPT-OSS.
BIASED = """
def forward(self, hidden_states, router_indices=None, routing_weights=None):
    next_states = torch.zeros_like(
        hidden_states, dtype=hidden_states.dtype, device=hidden_states.device
    )
    with torch.no_grad():
        expert_mask = torch.nn.functional.one_hot(router_indices, num_classes=self.num_experts)
        expert_mask = expert_mask.permute(2, 1, 0)
        expert_hit = torch.greater(expert_mask.sum(dim=(-1, -2)), 0).nonzero()
    for expert_idx in expert_hit:
        expert_idx = expert_idx[0]
        if expert_idx == self.num_experts:
            continue
        top_k_pos, token_idx = torch.where(expert_mask[expert_idx])
        current_state = hidden_states[token_idx]
        gate_up = (
            current_state @ self.gate_up_proj[expert_idx] + self.gate_up_proj_bias[expert_idx]
        )
        gated_output = self._apply_gate(gate_up)
        out = gated_output @ self.down_proj[expert_idx] + self.down_proj_bias[expert_idx]
        weighted_output = out * routing_weights[token_idx, top_k_pos, None]
        next_states.index_add_(0, token_idx, weighted_output.to(hidden_states.dtype))
    return next_states
"""
# OpenAI's privacy filter.
IN_FLOAT32 = """
def forward(self, hidden_states, router_indices=None, routing_weights=None):
    dtype = hidden_states.dtype
    next_states = torch.zeros_like(
        hidden_states, dtype=torch.float32, device=hidden_states.device
    )
    with torch.no_grad():
        expert_mask = torch.nn.functional.one_hot(router_indices, num_classes=self.num_experts)
        expert_mask = expert_mask.permute(2, 1, 0)
        expert_hit = torch.greater(expert_mask.sum(dim=(-1, -2)), 0).nonzero()
    for expert_idx in expert_hit:
        expert_idx = expert_idx[0]
        if expert_idx == self.num_experts:
            continue
        top_k_pos, token_idx = torch.where(expert_mask[expert_idx])
        current_state = hidden_states[token_idx]
        gate_up = (
            current_state.float() @ self.gate_up_proj[expert_idx].float()
            + self.gate_up_proj_bias[expert_idx].float()
        )
        gated_output = self._apply_gate(gate_up).float()
        out = (
            gated_output.float() @ self.down_proj[expert_idx].float()
            + self.down_proj_bias[expert_idx].float()
        )
        weighted_output = out * routing_weights[token_idx, top_k_pos, None].float()
        next_states.index_add_(0, token_idx, weighted_output)
    return next_states.to(dtype)
"""
_LOOP = """
def forward(self, hidden_states, top_k_index, top_k_weights):
    final_hidden_states = torch.zeros_like(hidden_states)
    with torch.no_grad():
        expert_mask = {nn}.functional.one_hot(top_k_index, num_classes=self.num_experts + 1)
        expert_mask = expert_mask.permute(2, 1, 0)
        expert_hit = torch.greater(expert_mask.sum(dim=(-1, -2)), 0).nonzero()
    for expert_idx in expert_hit:
        expert_idx = expert_idx[0]
        if expert_idx == self.num_experts:
            continue
        top_k_pos, token_idx = torch.where(expert_mask[expert_idx])
        current_state = hidden_states[token_idx]
{products}
        current_hidden_states = (
            current_hidden_states * top_k_weights[token_idx, top_k_pos, None]
        )
        final_hidden_states.index_add_(
            0, token_idx, current_hidden_states.to(final_hidden_states.dtype)
        )
    return final_hidden_states
"""
_TRANSPOSED = """
        gate, up = (current_state @ self.gate_up_proj[expert_idx]).chunk(2, dim=-1)
        current_hidden_states = self.act_fn(gate) * up
        current_hidden_states = current_hidden_states @ self.down_proj[expert_idx]
"""
_NORMED = """
        gate, up = nn.functional.linear(
            current_state, self.gate_up_proj[expert_idx]
        ).chunk(2, dim=-1)
        current_hidden_states = self.act_fn(gate) * up
        current_hidden_states = nn.functional.linear(
            current_hidden_states, self.down_proj[expert_idx]
        )
        current_hidden_states = self.post_expert_norm(current_hidden_states)
"""
# Aria.
TRANSPOSED = _LOOP.format(nn="nn", products=_TRANSPOSED)
# Muse Spark.
NORMED = _LOOP.format(nn="torch.nn", products=_NORMED)
# Nemotron-H.
UNGATED = """
def forward(self, hidden_states, top_k_index, top_k_weights):
    final_hidden_states = torch.zeros_like(hidden_states, dtype=top_k_weights.dtype)
    with torch.no_grad():
        expert_mask = torch.nn.functional.one_hot(top_k_index, num_classes={classes})
        expert_mask = expert_mask.permute(2, 1, 0)
        expert_hit = torch.greater(expert_mask.sum(dim=(-1, -2)), 0).nonzero().squeeze(-1)
    for expert_idx in expert_hit:
        expert_idx = expert_idx.item()
        top_k_pos, token_idx = torch.where(expert_mask[expert_idx])
        if token_idx.numel() == 0:
            continue
        current_state = hidden_states[token_idx]
        current_hidden_states = torch.nn.functional.linear(
            current_state, self.up_proj[expert_idx]
        )
        current_hidden_states = self.act_fn(current_hidden_states)
        current_hidden_states = torch.nn.functional.linear(
            current_hidden_states, self.down_proj[expert_idx]
        )
        current_hidden_states = (
            current_hidden_states * top_k_weights[token_idx, top_k_pos, None]
        )
        final_hidden_states.index_add_(
            0, token_idx, current_hidden_states.to(final_hidden_states.dtype)
        )
    return final_hidden_states.to(hidden_states.dtype)
"""
