"""rope in plain PyTorch: x cos + roll(x) sin, with the signs of the rotation put into sin once."""

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
    cos, sin = cos.unsqueeze(unsqueeze_dim), _signed(sin).unsqueeze(unsqueeze_dim)
    return _rotate(q, cos, sin, cast), _rotate(k, cos, sin, cast)


def _signed(sin: torch.Tensor, back: bool = False) -> torch.Tensor:
    """(-sin1, sin2), so that x cos + roll(x) signed is x turned.

    Or ``back``, (sin2, -sin1), which turns by the transpose, as the backward needs.
    """
    first, second = sin.chunk(2, dim=-1)
    return torch.cat((second, -first) if back else (-first, second), dim=-1)


def _rotate(x: torch.Tensor, cos: torch.Tensor, signed: torch.Tensor, cast: bool) -> torch.Tensor:
    width = cos.shape[-1]
    turned = x[..., :width] if width < x.shape[-1] else x
    out = (turned * cos).add_(turned.roll(width // 2, -1) * signed)
    if width < x.shape[-1]:
        out = torch.cat((out, x[..., width:]), dim=-1)
    return out.to(x.dtype) if cast else out


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
        ctx.save_for_backward(q, k, cos, sin)
        ctx.options = unsqueeze_dim, cast
        cos, sin = cos.unsqueeze(unsqueeze_dim), _signed(sin).unsqueeze(unsqueeze_dim)
        return _rotate(q, cos, sin, cast), _rotate(k, cos, sin, cast)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        q, k, cos, sin = ctx.saved_tensors
        if torch.is_grad_enabled():
            again = eager_gradients(
                lambda a, b: reference.rope(a, b, cos, sin, *ctx.options), (q, k), grads
            )
            return *again, None, None, None, None
        cos = cos.unsqueeze(ctx.options[0])
        signed = _signed(sin, back=True).unsqueeze(ctx.options[0])
        found = [
            _rotate(grad, cos, signed, cast=False).to(x.dtype) if needed else None
            for grad, x, needed in zip(grads, (q, k), ctx.needs_input_grad[:2], strict=True)
        ]
        return *found, None, None, None, None
