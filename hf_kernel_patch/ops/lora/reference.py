"""The definition, in plain differentiable PyTorch."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def lora(
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    base: torch.Tensor | None = None,
    dropped: torch.Tensor | None = None,
    b_bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """A linear layer and its low-rank adapter (Hu et al. 2021, arXiv:2106.09685).

    x W^T + bias + scaling * (dropped A^T) B^T. With ``scale`` all of it but the bias is multiplied
    by that, column by column, as DoRA does (Liu et al. 2024, arXiv:2402.09353).

    Args:
        x: (..., I), floating point.
        a: (R, I), the adapter's first weight.
        b: (O, R), its second one, of a's dtype, which need not be x's.
        scaling: what the adapter's result is multiplied by.
        weight: (O, I), the layer's, of x's dtype.
        bias: (O,), the layer's.
        base: (..., O), what the layer has given, where ``weight`` is None.
        dropped: (..., I), of any floating dtype, what the adapter takes in place of x.
        b_bias: (O,), the adapter's.
        scale: (O,), of any floating dtype.
        dtype: of the arithmetic.

    Returns:
        (..., O) in the dtype of x, or of the base.
    """
    seen = (x if dropped is None else dropped).to(dtype)
    if base is not None:
        result = base.to(dtype)
    else:
        assert weight is not None, "a weight or a base is given"
        result = F.linear(x.to(dtype), weight.to(dtype))
    added = F.linear(F.linear(seen, a.to(dtype)), b.to(dtype))
    if b_bias is not None:
        added = added + b_bias.to(dtype)
    result = result + added * scaling
    if scale is not None:
        result = result * scale.to(dtype)
    if bias is not None:
        result = result + bias.to(dtype)
    return result.to(x.dtype if base is None else base.dtype)
