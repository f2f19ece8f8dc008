"""add_rms_norm in plain PyTorch."""

from __future__ import annotations

import torch

from hf_kernel_patch.ops.rms_norm.torch import rms_norm


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    offset: float = 0.0,
    cast_first: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`hf_kernel_patch.ops.add_rms_norm.reference.add_rms_norm`."""
    total = residual + x
    return total, rms_norm(total, weight, eps, offset, cast_first)
