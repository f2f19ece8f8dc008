"""rope in plain PyTorch: x cos + roll(x) sin, with the signs of the rotation put into sin once."""

from __future__ import annotations

from typing import Any

import torch


def rope(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    unsqueeze_dim: int = 1,
    cast: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`hf_kernel_patch.ops.rope.reference.rope`, with the bits of the original."""
    first, second = sin.chunk(2, dim=-1)
    cos = cos.unsqueeze(unsqueeze_dim)
    signed = torch.cat((-first, second), dim=-1).unsqueeze(unsqueeze_dim)
    return _turn(q, cos, signed, _dtype(q, cos, cast)), _turn(k, cos, signed, _dtype(k, cos, cast))


def _dtype(x: torch.Tensor, cos: torch.Tensor, cast: bool) -> torch.dtype:
    return x.dtype if cast else torch.promote_types(x.dtype, cos.dtype)


def _turn(
    x: torch.Tensor, cos: torch.Tensor, signed: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    if torch.is_grad_enabled() and x.requires_grad:
        return _Rotate.apply(x, cos, signed, dtype)
    return _rotate(x, cos, signed, dtype)


def _rotate(
    x: torch.Tensor, cos: torch.Tensor, signed: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    width = cos.shape[-1]
    turned = x[..., :width] if width < x.shape[-1] else x
    out = (turned * cos).add_(turned.roll(width // 2, -1) * signed)
    if width < x.shape[-1]:
        out = torch.cat((out, x[..., width:]), dim=-1)
    return out.to(dtype)


class _Rotate(torch.autograd.Function):
    """Linear in x, so it keeps no x, and its backward is itself with the transposed rotation."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, cos: torch.Tensor, signed: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        ctx.save_for_backward(cos, signed)
        ctx.dtype = x.dtype
        return _rotate(x, cos, signed, dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        cos, signed = ctx.saved_tensors
        back = signed.roll(cos.shape[-1] // 2, -1)
        return _turn(grad, cos, back, ctx.dtype), None, None, None
