"""add_rms_norm through torch_npu's npu_add_rms_norm and npu_rms_norm_backward."""

# npu_add_rms_norm has no backward of its own, but returns the sum and 1 over its root mean square,
# which are what npu_rms_norm_backward takes.

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch_npu

from hf_kernel_patch.ops._shared.autograd import eager_gradients
from hf_kernel_patch.ops.rms_norm import reference
from hf_kernel_patch.ops.rms_norm.npu import gradients, rms_norm

if TYPE_CHECKING:
    from torch.autograd.function import FunctionCtx


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    offset: float = 0.0,
    cast_first: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`hf_kernel_patch.ops.add_rms_norm.reference.add_rms_norm`; x as rms_norm takes it.

    One operator where all three have one dtype and there is no offset, else a sum and rms_norm.
    """
    if offset or not x.dtype == residual.dtype == weight.dtype:
        total = residual + x
        return total, rms_norm(total, weight, eps, offset, cast_first)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, residual, weight)):
        return _AddRMSNorm.apply(x, residual, weight, eps)
    normed, _, total = torch_npu.npu_add_rms_norm(x, residual, weight, eps)
    return total, normed


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        normed, rstd, total = torch_npu.npu_add_rms_norm(x, residual, weight, eps)
        ctx.save_for_backward(total, weight, rstd)
        ctx.eps = eps
        if not any(ctx.needs_input_grad[:2]):
            ctx.mark_non_differentiable(total)
        return total, normed

    @staticmethod
    def backward(
        ctx: FunctionCtx, grad_total: torch.Tensor, grad: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        total, weight, rstd = ctx.saved_tensors
        for_x, for_residual, for_weight, _ = ctx.needs_input_grad
        if torch.is_grad_enabled():
            through, grad_weight = eager_gradients(
                lambda t, w: reference.rms_norm(t, w, ctx.eps), (total, weight), (grad,)
            )
        else:
            needed = (for_x or for_residual, for_weight)
            through, grad_weight = gradients(grad, total, weight, rstd, 0.0, needed)
        both = None if through is None else through + grad_total
        return both if for_x else None, both if for_residual else None, grad_weight, None
