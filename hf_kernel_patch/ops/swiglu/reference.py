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
        activation: "silu", or "gelu_tanh" for the tanh approximation of GELU.
        dtype: of the arithmetic.

    Returns:
        (..., I) in gate's dtype.
    """
    wide = gate.to(dtype)
    activated = F.silu(wide) if activation == "silu" else F.gelu(wide, approximate="tanh")
    return (activated * up.to(dtype)).to(gate.dtype)
