"""Which dimensions of q, k, cos and sin are what. Imports no backend.

Kernels over heads know q and k as (B, heads, S, D) or (B, S, heads, D), with cos and sin (B or 1,
S or 1, R). Vision models pack their images: q is (S, heads, D) there, and cos (S, R).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

#: Values of the op's ``pairs`` and ``angles``; see its reference.
HALVES, INTERLEAVED, TO_HALVES = "halves", "interleaved", "interleaved_to_halves"
ELEMENTS, FIRST_HALF, PER_PAIR = "elements", "first_half", "pairs"


def width_of(cos: torch.Tensor, angles: str) -> int:
    """How many elements of a head are rotated."""
    width: int = cos.shape[-1]
    return 2 * width if angles == PER_PAIR else width


def heads_of(q: torch.Tensor, cos: torch.Tensor, unsqueeze_dim: int) -> int:
    """The heads' dimension of q, were q of four dimensions and cos of three.

    0 where there is no such q: its own dimensions and those of cos do not fit.
    """
    size = cos.dim()
    if not (size in (2, 3) and size < q.dim() <= 4 and -size - 1 <= unsqueeze_dim <= size):
        return 0
    heads = unsqueeze_dim % (size + 1) + 3 - size
    return heads if heads in (1, 2) else 0


def usual(q: torch.Tensor, cos: torch.Tensor, unsqueeze_dim: int) -> bool:
    """Whether q is of four dimensions and cos of three, with the heads' counted from the first."""
    return bool(cos.dim() == 3 and q.dim() == 4 and unsqueeze_dim > 0)


def as_usual(
    q: torch.Tensor,
    k: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    unsqueeze_dim: int,
) -> tuple[Any, Any, Any, Any, int]:
    """Views of four dimensions of q and k, and of three of cos and sin, and the heads' dimension.

    Raises ValueError where there are none.
    """
    heads = heads_of(q, cos, unsqueeze_dim)
    if not heads:
        raise ValueError(
            f"q of {q.dim()} dimensions, cos of {cos.dim()} and unsqueeze_dim {unsqueeze_dim}"
        )
    if q.dim() == 3:
        q, k = q.unsqueeze(0), None if k is None else k.unsqueeze(0)
    if cos.dim() == 2:
        cos, sin = cos.unsqueeze(0), sin.unsqueeze(0)
    return q, k, cos, sin, heads


def shaped_as(q: torch.Tensor, found: tuple[Any, Any]) -> tuple[Any, Any]:
    """What was found for ``as_usual``, in the dimensions of q."""
    if q.dim() == 4:
        return found
    first, second = found
    return first.squeeze(0), None if second is None else second.squeeze(0)
