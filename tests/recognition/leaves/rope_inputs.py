"""Inputs of the rotary functions that the tests of all leaves call."""

from __future__ import annotations

import torch

ROPE = ("llama", "phi3", "olmo2")


def rope_inputs(name: str, heads_at: int) -> tuple[torch.Tensor, ...]:
    """q (2, 3, 5, 8) and k (2, 1, 5, 8), or with the heads at 2, and cos and sin (1, 5, R)."""
    generator = torch.Generator().manual_seed(0)
    width = 6 if name == "phi3" else 8

    def heads(count: int) -> torch.Tensor:
        x = torch.randn(2, count, 5, 8, generator=generator)
        return x if heads_at == 1 else x.transpose(1, 2)

    cos, sin = (torch.randn(1, 5, width, generator=generator) for _ in range(2))
    return heads(3), heads(1), cos, sin
