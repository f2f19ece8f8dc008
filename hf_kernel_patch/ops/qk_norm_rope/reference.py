"""The definition, in plain differentiable PyTorch."""

from __future__ import annotations

import torch

from hf_kernel_patch.ops.rms_norm.reference import rms_norm
from hf_kernel_patch.ops.rope.reference import rope
from hf_kernel_patch.ops.rope.shapes import ELEMENTS, HALVES


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
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised queries and keys (Henry et al. 2020, arXiv:2010.04245), rotated.

    Args:
        q: (B, S, heads, D), as projected.
        k: (B, S, kv_heads, D).
        q_weight, k_weight: (D,) of the RMSNorm over the elements of every head.
        eps, offset, cast_first: as ``rms_norm`` takes them.
        cos, sin: (1 or B, S, R), as ``rope`` takes them.
        unsqueeze_dim: 1 for results of shape (B, heads, S, D), 2 for (B, S, heads, D).
        cast, upcast: as ``rope`` takes them: round to the dtype of the norms' results, and rotate
            in float32 at least.
        pairs, angles: as ``rope`` takes them: "halves" or "interleaved", "elements" or
            "first_half".
        dtype: of the arithmetic, for the truth; otherwise that of ``rms_norm`` and of ``rope``.

    Returns:
        q and k, normalised and rotated, in the dtype that q, its weight (with ``cast_first``) and
        (without ``cast``) cos promote to.
    """

    def normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        out = rms_norm(x, weight, eps, offset, cast_first, dtype=dtype or torch.float32)
        return out.transpose(1, 2) if unsqueeze_dim == 1 else out

    heads = normed(q, q_weight), normed(k, k_weight)
    return rope(*heads, cos, sin, unsqueeze_dim, cast, pairs, angles, upcast, dtype)
