"""The definition, in plain differentiable PyTorch."""

from __future__ import annotations

import torch

from hf_kernel_patch.ops.rms_norm.reference import rms_norm


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    offset: float = 0.0,
    cast_first: bool = True,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The next residual and its norm, as a decoder layer computes them one after the other.

    Args:
        x, residual: (..., H), floating point.
        weight, eps, offset, cast_first, dtype: as :func:`rms_norm` takes them.

    Returns:
        residual + x, rounded to the dtype that both promote to, and the rms_norm of that.
    """
    total = residual + x
    return total, rms_norm(total, weight, eps, offset, cast_first, dtype=dtype)
