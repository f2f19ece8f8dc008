"""The definition, in plain differentiable PyTorch."""

from __future__ import annotations

import torch

from hf_kernel_patch.ops.rope.shapes import (
    ELEMENTS,
    FIRST_HALF,
    HALVES,
    INTERLEAVED,
    PER_PAIR,
    width_of,
)


def rope(
    q: torch.Tensor,
    k: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    unsqueeze_dim: int = 1,
    cast: bool = False,
    pairs: str = HALVES,
    angles: str = ELEMENTS,
    upcast: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864).

    Of each head the first R elements are taken in pairs, and a pair (a, b) becomes
    (a cos - b sin, b cos + a sin); the last D - R elements pass unchanged.

    Args:
        q: (B, heads, S, D), or any shape that cos broadcasts to after the unsqueeze.
        k: (B, kv_heads, S, D), or None.
        cos: (1 or B, S, R) with R even and at most D, or (1 or B, S, R / 2), by ``angles``.
        sin: as cos.
        unsqueeze_dim: where cos and sin get the dimension of the heads: 1, or 2 for q of shape
            (B, S, heads, D).
        cast: round to q's and k's dtype; otherwise the dtype that q, cos and sin promote to.
        pairs: "halves" for elements i and i + R / 2; "interleaved" for 2i and 2i + 1;
            "interleaved_to_halves" for the latter, with the results at i and i + R / 2.
        angles: "elements" where each element has its own cos and sin, at the place of its result;
            "first_half" where pair i takes those at i and the rest of cos and sin is not read;
            "pairs" where cos and sin have no more than one value for each pair.
        upcast: compute in float32 at least.
        dtype: of the arithmetic, for the truth in float32 or float64; the originals compute in
            the promoted dtype.

    Returns:
        q and k, rotated; None for a k that is None.
    """
    width = width_of(cos, angles)
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)

    def of_pairs(angle: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Those of the first elements of all pairs, and of the second."""
        if angles == PER_PAIR:
            return angle, angle
        if angles == FIRST_HALF:
            return angle[..., : width // 2], angle[..., : width // 2]
        return _pairs(angle, pairs == INTERLEAVED)

    def rotated(x: torch.Tensor) -> torch.Tensor:
        promoted = torch.promote_types(torch.promote_types(x.dtype, cos.dtype), sin.dtype)
        out = x.dtype if cast else promoted
        to = dtype or (torch.promote_types(promoted, torch.float32) if upcast else promoted)
        first, second = _pairs(x[..., :width].to(to), pairs != HALVES)
        (cos1, cos2), (sin1, sin2) = (of_pairs(angle.to(to)) for angle in (cos, sin))
        rotated = first * cos1 - second * sin1, second * cos2 + first * sin2
        if pairs == INTERLEAVED:
            joined = torch.stack(rotated, dim=-1).flatten(-2)
        else:
            joined = torch.cat(rotated, dim=-1)
        return torch.cat((joined, x[..., width:].to(to)), dim=-1).to(out)

    return rotated(q), None if k is None else rotated(k)


def _pairs(x: torch.Tensor, interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    if interleaved:
        return x[..., 0::2], x[..., 1::2]
    first, second = x.chunk(2, dim=-1)
    return first, second
