"""The definition, in plain differentiable PyTorch."""

from __future__ import annotations

import torch


def rope(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    unsqueeze_dim: int = 1,
    cast: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864) in the half-split layout.

    Args:
        q: (B, heads, S, D), or any shape that cos broadcasts to after the unsqueeze.
        k: (B, kv_heads, S, D).
        cos: (1 or B, S, R) with R even and at most D; the last D - R elements pass unchanged.
        sin: as cos.
        unsqueeze_dim: where cos and sin get the dimension of the heads: 1, or 2 for q of shape
            (B, S, heads, D).
        cast: round to q's and k's dtype; otherwise the dtype that q and cos promote to.
        dtype: of the arithmetic, for the truth in float32 or float64; the originals compute in
            the promoted dtype.

    Returns:
        q and k, rotated.
    """
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)

    def rotated(x: torch.Tensor) -> torch.Tensor:
        out = x.dtype if cast else torch.promote_types(x.dtype, cos.dtype)
        to = dtype or torch.promote_types(x.dtype, cos.dtype)
        turned, passed = x[..., : cos.shape[-1]].to(to), x[..., cos.shape[-1] :]
        first, second = turned.chunk(2, dim=-1)
        half = torch.cat((-second, first), dim=-1)
        return torch.cat((turned * cos.to(to) + half * sin.to(to), passed.to(to)), dim=-1).to(out)

    return rotated(q), rotated(k)
