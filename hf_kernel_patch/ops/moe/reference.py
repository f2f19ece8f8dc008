"""The definition, in plain differentiable PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch.nn import functional as F

#: Gate and up of every expert: one tensor (E, 2I, H), or E pairs of (I, H).
GateUp: TypeAlias = torch.Tensor | Sequence[tuple[torch.Tensor, torch.Tensor]]
#: The second projection of every expert: one tensor (E, H, I), or E tensors (H, I).
Down: TypeAlias = torch.Tensor | Sequence[torch.Tensor]


def moe(
    hidden: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    gate_up: GateUp,
    down: Down,
    activation: str = "silu",
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Sum over a token's experts of weight * down(activation(gate x) * up x).

    Args:
        hidden: (T, H) tokens.
        index: (T, K) int64 experts of every token; an index of E, the number of experts, stands
            for an expert of another rank under expert parallelism and adds nothing.
        weights: (T, K) routing weights, of hidden's dtype or float32.
        gate_up: (E, 2I, H), or E pairs (gate, up), each (I, H).
        down: (E, H, I), or E tensors (H, I).
        activation: "silu" or "gelu_tanh".
        dtype: of the arithmetic.

    Returns:
        (T, H) in hidden's dtype.
    """
    wide = hidden.to(dtype)
    out = torch.zeros_like(wide)
    chosen = bool((index < len(down)).any())  # where none is, the empty sum still has a gradient
    for expert in range(len(down)):
        first: Any = gate_up[expert]
        second: Any = down[expert]
        gate_weight, up_weight = first.chunk(2) if isinstance(first, torch.Tensor) else first
        token, slot = torch.where(index == expert)
        if not len(token) and chosen:
            continue  # and so, in a list, no gradient
        x = wide[token]
        gate, up = F.linear(x, gate_weight.to(dtype)), F.linear(x, up_weight.to(dtype))
        act = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
        y = F.linear(act * up, second.to(dtype)) * weights[token, slot, None].to(dtype)
        out = out.index_add(0, token, y)
    return out.to(hidden.dtype)
