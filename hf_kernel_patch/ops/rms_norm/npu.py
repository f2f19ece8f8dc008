"""rms_norm through torch_npu's npu_rms_norm and npu_rms_norm_backward."""

# npu_rms_norm over npu_gemma_rms_norm, whose page has no formula and which has no backward.

from __future__ import annotations

from typing import Any

import torch
import torch_npu

from hf_kernel_patch.ops.autograd import eager_gradients
from hf_kernel_patch.ops.rms_norm import reference


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0, cast_first: bool = True
) -> torch.Tensor:
    """As :func:`hf_kernel_patch.ops.rms_norm.reference.rms_norm`, but rounded only once.

    x has 2 to 8 dimensions and an element; the weight is one number for each element of a row.
    """
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _RMSNorm.apply(x, weight, eps, offset, cast_first)
    return _forward(x, weight, eps, offset, cast_first)[0]


def _operands(
    x: torch.Tensor, weight: torch.Tensor, offset: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x and gamma in one dtype, as the operator's page asks for.

    Where that is not x's already, and for 1 + weight, which half precision would round before it
    is used, it is float32.
    """
    if weight.dtype == x.dtype and not offset:
        return x, weight
    return x.float(), weight.float() + offset if offset else weight.float()


def _forward(
    x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float, cast_first: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, and 1 over the root mean square of every row, float32 (..., 1)."""
    wide, gamma = _operands(x, weight, offset)
    out, rstd = torch_npu.npu_rms_norm(wide, gamma, eps)
    return out.to(torch.promote_types(x.dtype, weight.dtype) if cast_first else x.dtype), rstd


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
        wide, gamma = _operands(x, weight, ctx.options[1])
        found = torch_npu.npu_rms_norm_backward(grad.to(wide.dtype), wide, gamma, rstd)
        grad_x, grad_weight = (
            one.to(like.dtype) if needed else None
            for one, like, needed in zip(found, (x, weight), ctx.needs_input_grad[:2], strict=True)
        )
        return grad_x, grad_weight, None, None, None
