"""rope in plain PyTorch: one output tensor, and half-width temporaries instead of full ones."""

from __future__ import annotations

from typing import Any

import torch

from hf_kernel_patch.ops.autograd import eager_gradients
from hf_kernel_patch.ops.rope import reference


def rope(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    unsqueeze_dim: int = 1,
    cast: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`hf_kernel_patch.ops.rope.reference.rope`, with the bits of the original."""
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        return _RoPE.apply(q, k, cos, sin, unsqueeze_dim, cast)
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return _rotate(q, cos, sin, _dtype(q, cos, cast)), _rotate(k, cos, sin, _dtype(k, cos, cast))


def _dtype(x: torch.Tensor, cos: torch.Tensor, cast: bool) -> torch.dtype:
    return x.dtype if cast else torch.promote_types(x.dtype, cos.dtype)


def _rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, dtype: torch.dtype, back: bool = False
) -> torch.Tensor:
    """x turned by the angles of cos and sin, or ``back`` by the transpose, as the backward needs.

    x1 cos1 - x2 sin1 and x2 cos2 + x1 sin2; backward, sin2 and -sin1 change places.
    """
    width = cos.shape[-1]
    half = width // 2
    partial = width < x.shape[-1]
    out = (x[..., :width] if partial else x) * cos
    first, second = x[..., :half], x[..., half:width]
    low, high = sin[..., :half], sin[..., half:]
    if back:
        out[..., :half].add_(second * high)
        out[..., half:].sub_(first * low)
    else:
        out[..., :half].sub_(second * low)
        out[..., half:].add_(first * high)
    if partial:
        out = torch.cat((out, x[..., width:]), dim=-1)
    return out.to(dtype)


class _RoPE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        unsqueeze_dim: int,
        cast: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wide_cos, wide_sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        ctx.save_for_backward(q, k, cos, sin)
        ctx.options = unsqueeze_dim, cast
        return (
            _rotate(q, wide_cos, wide_sin, _dtype(q, cos, cast)),
            _rotate(k, wide_cos, wide_sin, _dtype(k, cos, cast)),
        )

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        q, k, cos, sin = ctx.saved_tensors
        if torch.is_grad_enabled():
            again = eager_gradients(
                lambda a, b: reference.rope(a, b, cos, sin, *ctx.options), (q, k), grads
            )
            return *again, None, None, None, None
        cos, sin = cos.unsqueeze(ctx.options[0]), sin.unsqueeze(ctx.options[0])
        found = [
            _rotate(grad, cos, sin, x.dtype, back=True) if needed else None
            for grad, x, needed in zip(grads, (q, k), ctx.needs_input_grad[:2], strict=True)
        ]
        return *found, None, None, None, None
