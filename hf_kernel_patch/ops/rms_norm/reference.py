"""The definition, in plain differentiable PyTorch."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    offset: float = 0.0,
    cast_first: bool = True,
    gate: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Root mean square layer normalisation (Zhang and Sennrich 2019, arXiv:1910.07467).

    Args:
        x: (..., H), floating point.
        weight: (H,).
        eps: added to the mean square.
        offset: added to the weight; 1 in Gemma, which stores the weight less one.
        cast_first: Llama rounds the normalised x to x's dtype and then multiplies by the weight,
            which gives the dtype that both promote to; OLMo2 and Gemma multiply first and round
            to x's dtype at the end.
        gate: (..., H) or None: the norm is multiplied by silu(gate) and rounded to x's dtype, as
            after Qwen3-Next's linear attention.
        dtype: of the arithmetic; float32 as in the originals, float64 for the truth.

    Returns:
        (..., H).
    """
    wide = x.to(dtype)
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if cast_first:
        out = weight * normed.to(x.dtype)
    else:
        out = (normed * (offset + weight.to(dtype))).to(x.dtype)
    return out if gate is None else (out * F.silu(gate.to(dtype))).to(x.dtype)
