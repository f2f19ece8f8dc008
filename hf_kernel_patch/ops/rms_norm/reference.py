"""The definition, in plain differentiable PyTorch."""

from __future__ import annotations

import torch
from torch.nn import functional as F

#: What a gate goes through before it is multiplied by.
ACTIVATIONS = {"silu": F.silu, "sigmoid": torch.sigmoid}


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    offset: float = 0.0,
    cast_first: bool = True,
    gate: torch.Tensor | None = None,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    activation: str = "silu",
    cast_to_weight: bool = False,
    cast_scale: bool = False,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Root mean square layer normalisation (Zhang and Sennrich 2019, arXiv:1910.07467).

    Args:
        x: (..., H), floating point.
        weight: (H,), or None for a norm that is rounded to x's dtype and not scaled.
        eps: added to the mean square.
        offset: added to the weight; 1 in Gemma, which stores the weight less one.
        cast_first: Llama rounds the normalised x to x's dtype and then multiplies by the weight,
            which gives the dtype that both promote to; OLMo2 and Gemma multiply first and round
            to x's dtype at the end.
        gate: (..., H) or None: the norm is multiplied by the gate's activation and then rounded to
            x's dtype, as after Qwen3-Next's linear attention. What is not ``cast_first`` is rounded
            there alone.
        group_size: how many elements of a row are normalised together, which divides H; None for
            the whole row.
        norm_before_gate: False where x is multiplied by the gate's activation before it is
            normalised, as in Mamba2; the output then is that of a norm without a gate.
        activation: of the gate, "silu" or "sigmoid".
        cast_to_weight: with ``cast_first``, the normalised x is rounded to the weight's dtype in
            place of its own, as T5 does.
        cast_scale: 1 over the root mean square is rounded to x's dtype before x is multiplied by
            it, as DeepSeek-V4 does.
        dtype: of the arithmetic; float32 as in the originals, float64 for the truth.

    Returns:
        (..., H).
    """
    wide = x.to(dtype)
    factor = None if gate is None else ACTIVATIONS[activation](gate.to(dtype))
    if factor is not None and not norm_before_gate:
        wide = wide * factor
        factor = None
    if group_size is not None:
        wide = wide.unflatten(-1, (-1, group_size))
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    normed = wide * (scale.to(x.dtype).to(dtype) if cast_scale else scale)
    if group_size is not None:
        normed = normed.flatten(-2)
    if weight is None:
        out = normed
    elif cast_first:
        out = weight * normed.to(weight.dtype if cast_to_weight else x.dtype)
    else:
        out = normed * (offset + weight.to(dtype))
    if factor is not None:
        out = out * factor
    elif cast_first and weight is not None:
        return out
    return out.to(x.dtype)
