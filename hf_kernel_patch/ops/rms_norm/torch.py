"""rms_norm in plain PyTorch: the original's forward, and a backward of fewer passes."""

from __future__ import annotations

from typing import Any

import torch

from hf_kernel_patch.ops.autograd import eager_gradients
from hf_kernel_patch.ops.rms_norm import reference


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0, cast_first: bool = True
) -> torch.Tensor:
    """As :func:`hf_kernel_patch.ops.rms_norm.reference.rms_norm`, bit for bit in the forward."""
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _RMSNorm.apply(x, weight, eps, offset, cast_first)
    return _forward(x, weight, eps, offset, cast_first)[0]


def _forward(
    x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float, cast_first: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    wide = x.float()
    rstd = wide.pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()
    normed = wide * rstd
    if not cast_first:
        return normed.mul_(weight.float() + offset if offset else weight).to(x.dtype), rstd
    normed = normed.to(x.dtype)
    if normed.dtype == weight.dtype:
        return normed.mul_(weight), rstd
    return weight * normed, rstd


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        offset: float,
        cast_first: bool,
    ) -> torch.Tensor:
        out, rstd = _forward(x, weight, eps, offset, cast_first)
        ctx.save_for_backward(x, weight, rstd)
        ctx.options = eps, offset, cast_first
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, weight, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():
            again = eager_gradients(
                lambda a, b: reference.rms_norm(a, b, *ctx.options), (x, weight), (grad,)
            )
            return *again, None, None, None
        offset = ctx.options[1]
        normed = x.float() * rstd
        grad = grad.float()
        grad_x = grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * normed).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            # d(x rstd) = rstd (g - normed mean(g normed)), with g the gradient of the normed x
            scaled = grad * (weight.float() + offset if offset else weight)
            mean = (scaled * normed).mean(-1, keepdim=True)
            grad_x = scaled.sub_(normed.mul_(mean)).mul_(rstd).to(x.dtype)
        return grad_x, grad_weight, None, None, None
