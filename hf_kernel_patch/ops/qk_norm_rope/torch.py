"""qk_norm_rope in plain PyTorch: rms_norm and rope one after the other."""

from __future__ import annotations

import torch

from hf_kernel_patch.ops.rms_norm.torch import rms_norm
from hf_kernel_patch.ops.rope.shapes import ELEMENTS, HALVES
from hf_kernel_patch.ops.rope.torch import rope


def qk_norm_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    unsqueeze_dim: int = 1,
    offset: float = 0.0,
    cast_first: bool = True,
    cast: bool = False,
    upcast: bool = False,
    pairs: str = HALVES,
    angles: str = ELEMENTS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`hf_kernel_patch.ops.qk_norm_rope.reference.qk_norm_rope`, bit for bit."""
    q = rms_norm(q, q_weight, eps, offset, cast_first)
    k = rms_norm(k, k_weight, eps, offset, cast_first)
    if unsqueeze_dim == 1:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    return rope(q, k, cos, sin, unsqueeze_dim, cast, pairs, angles, upcast)
