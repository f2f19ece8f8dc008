"""rms_norm through torch_npu's npu_rms_norm and npu_rms_norm_backward."""

# npu_rms_norm over npu_gemma_rms_norm, whose page has no formula and which has no backward.
# The gate's silu and product are PyTorch's own: the originals compute them in float32, in which
# npu_swiglu would need gate and norm copied side by side first, more than it saves.

from __future__ import annotations

from typing import Any

import torch
import torch_npu
from torch.nn import functional as F

from hf_kernel_patch.ops.autograd import Gradients, Tensors, differentiable
from hf_kernel_patch.ops.rms_norm.torch import plain


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    offset: float = 0.0,
    cast_first: bool = True,
    gate: torch.Tensor | None = None,
) -> torch.Tensor:
    """As :func:`hf_kernel_patch.ops.rms_norm.reference.rms_norm`, the norm rounded only once.

    x has 2 to 8 dimensions and an element; the weight is one number for each element of a row.
    """
    return _rms_norm((x, weight) if gate is None else (x, weight, gate), (eps, offset, cast_first))


def operands(
    x: torch.Tensor, weight: torch.Tensor, offset: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x and gamma in one dtype, as the operators' pages ask for.

    Where that is not x's already, and for 1 + weight, which half precision would round before it
    is used, it is float32.
    """
    if weight.dtype == x.dtype and not offset:
        return x, weight
    return x.float(), weight.float() + offset if offset else weight.float()


def gradients(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    offset: float,
    needed: tuple[bool, ...],
) -> list[torch.Tensor | None]:
    """Gradients of x and the weight, given that of the norm (..., H); rstd (..., 1) float32."""
    if not any(needed):
        return [None, None]
    wide, gamma = operands(x, weight, offset)
    found = torch_npu.npu_rms_norm_backward(grad.to(wide.dtype), wide, gamma, rstd)
    return [
        one.to(like.dtype) if need else None
        for one, like, need in zip(found, (x, weight), needed, strict=True)
    ]


def _norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float, cast_first: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm, and 1 over the root mean square of every row, float32 (..., 1)."""
    out, rstd = torch_npu.npu_rms_norm(*operands(x, weight, offset), eps)
    return out.to(torch.promote_types(x.dtype, weight.dtype) if cast_first else x.dtype), rstd


def _forward(tensors: Tensors, options: tuple[Any, ...]) -> tuple[torch.Tensor, Tensors]:
    x, weight, *gate = tensors
    out, rstd = _norm(x, weight, *options)
    if gate:
        out = F.silu(gate[0].float()).mul_(out).to(x.dtype)
    return out, (rstd,)


def _backward(
    grad: torch.Tensor,
    tensors: Tensors,
    kept: Tensors,
    options: tuple[Any, ...],
    needed: tuple[bool, ...],
) -> Gradients:
    x, weight, *gate = tensors
    (rstd,) = kept
    if not gate:
        return gradients(grad, x, weight, rstd, options[1], needed)
    grad, wide = grad.float(), gate[0].float()
    grad_gate = None
    if needed[2]:
        out, _ = _norm(x, weight, *options)
        grad_gate = torch.ops.aten.silu_backward(grad * out, wide).to(gate[0].dtype)
    grad = F.silu(wide).mul_(grad)
    return *gradients(grad, x, weight, rstd, options[1], needed[:2]), grad_gate


_rms_norm = differentiable(_forward, _backward, plain)
