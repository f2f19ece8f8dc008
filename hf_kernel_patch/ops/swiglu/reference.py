"""The definition, in plain differentiable PyTorch."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def swiglu(
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: str = "silu",
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Gated linear unit (Shazeer 2020, arXiv:2002.05202): activation(gate) * up.

    Args:
        gate, up: (..., I), of one floating dtype.
        activation: "silu", "gelu", or "gelu_tanh" for the tanh approximation of GELU.
        dtype: of the arithmetic.

    Returns:
        (..., I) in gate's dtype.
    """
    return (activate(gate.to(dtype), activation) * up.to(dtype)).to(gate.dtype)


def activate(gate: torch.Tensor, activation: str) -> torch.Tensor:
    """The activation of that name of gate, a new tensor."""
    if activation == "silu":
        return F.silu(gate)
    return F.gelu(gate, approximate=APPROXIMATE[activation])


#: How torch's gelu computes the others.
APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}
