"""rope in plain PyTorch: x cos + swapped(x) sin, with the rotation's signs put into sin once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hf_kernel_patch.ops.rope.shapes import (
    ELEMENTS,
    FIRST_HALF,
    HALVES,
    INTERLEAVED,
    TO_HALVES,
)

if TYPE_CHECKING:
    from torch.autograd.function import FunctionCtx

#: Whether pairs are neighbours while they are rotated, and whether neighbours become halves before
#: that, or halves neighbours after it.
Layout = tuple[bool, bool, bool]


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
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As :func:`hf_kernel_patch.ops.rope.reference.rope`, with the bits of the original."""
    given = torch.promote_types(cos.dtype, sin.dtype)
    if upcast:
        cos, sin = cos.float(), sin.float()
    layout = (pairs == INTERLEAVED, pairs == TO_HALVES, False)
    cos, signed = _of_elements(cos, sin, layout[0], angles)
    cos, signed = cos.unsqueeze(unsqueeze_dim), signed.unsqueeze(unsqueeze_dim)

    def rotated(x: torch.Tensor) -> torch.Tensor:
        to = x.dtype if cast else torch.promote_types(x.dtype, given)
        return _rotate_tracked(x, cos, signed, to, layout)

    return rotated(q), None if k is None else rotated(k)


def _of_elements(
    cos: torch.Tensor, sin: torch.Tensor, neighbours: bool, angles: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of each element, sin negated for the first of each pair."""
    if angles == FIRST_HALF:
        half = cos.shape[-1] // 2
        cos, sin = cos[..., :half], sin[..., :half]
    if angles != ELEMENTS:
        return _joined(cos, cos, neighbours), _joined(-sin, sin, neighbours)
    if neighbours:
        return cos, _joined(-sin[..., 0::2], sin[..., 1::2], True)
    first, second = sin.chunk(2, dim=-1)
    return cos, _joined(-first, second, False)


def _joined(first: torch.Tensor, second: torch.Tensor, neighbours: bool) -> torch.Tensor:
    if neighbours:
        return torch.stack((first, second), dim=-1).flatten(-2)
    return torch.cat((first, second), dim=-1)


def _rotate_tracked(
    x: torch.Tensor, cos: torch.Tensor, signed: torch.Tensor, dtype: torch.dtype, layout: Layout
) -> torch.Tensor:
    if torch.is_grad_enabled() and x.requires_grad:
        out: torch.Tensor = _Rotate.apply(x, cos, signed, dtype, layout)
        return out
    return _rotate(x, cos, signed, dtype, layout)


def _rotate(
    x: torch.Tensor, cos: torch.Tensor, signed: torch.Tensor, dtype: torch.dtype, layout: Layout
) -> torch.Tensor:
    width = cos.shape[-1]
    neighbours, to_halves, to_neighbours = layout
    rotary = x[..., :width] if width < x.shape[-1] else x
    if to_halves:
        rotary = rotary.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
    out, other = rotary * cos, _swapped(rotary, neighbours) * signed
    out = out.add_(other) if out.dtype == other.dtype else out + other
    if to_neighbours:
        out = out.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
    if width < x.shape[-1]:
        out = torch.cat((out, x[..., width:]), dim=-1)
    return out.to(dtype)


def _swapped(x: torch.Tensor, neighbours: bool) -> torch.Tensor:
    """The other element of each pair."""
    if neighbours:
        return x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return x.roll(x.shape[-1] // 2, -1)


class _Rotate(torch.autograd.Function):
    """Linear in x, so it keeps no x, and its backward is itself with the transposed rotation."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: torch.Tensor,
        cos: torch.Tensor,
        signed: torch.Tensor,
        dtype: torch.dtype,
        layout: Layout,
    ) -> torch.Tensor:
        ctx.save_for_backward(cos, signed)
        ctx.dtype, ctx.layout = x.dtype, layout
        return _rotate(x, cos, signed, dtype, layout)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, signed = ctx.saved_tensors
        neighbours, to_halves, to_neighbours = ctx.layout
        layout = neighbours, to_neighbours, to_halves
        back = _swapped(signed, neighbours)
        return _rotate_tracked(grad, cos, back, ctx.dtype, layout), None, None, None, None
