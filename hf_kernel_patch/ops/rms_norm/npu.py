"""rms_norm through torch_npu's npu_rms_norm and npu_rms_norm_backward."""

# npu_rms_norm over npu_gemma_rms_norm, whose page has no formula and which has no backward.
# The gate's silu and product are PyTorch's own: the originals compute them in float32, in which
# npu_swiglu would need gate and norm copied side by side first, more than it saves.

from __future__ import annotations

from typing import Any

import torch
import torch_npu
from torch.nn import functional as F

from hf_kernel_patch.ops._shared.autograd import Gradients, Tensors, differentiable
from hf_kernel_patch.ops.rms_norm.extras import Extras
from hf_kernel_patch.ops.rms_norm.reference import ACTIVATIONS
from hf_kernel_patch.ops.rms_norm.torch import plain


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    offset: float = 0.0,
    cast_first: bool = True,
    gate: torch.Tensor | None = None,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    activation: str = "silu",
    cast_to_weight: bool = False,
    cast_scale: bool = False,
) -> torch.Tensor:
    """As :func:`hf_kernel_patch.ops.rms_norm.reference.rms_norm`, the norm rounded only once.

    x has 2 to 8 dimensions and an element; the weight is one number for each element of a row.
    """
    if (
        weight is None
        or group_size is not None
        or cast_to_weight
        or cast_scale
        or (gate is not None and not (cast_first and norm_before_gate and activation == "silu"))
    ):
        extras = Extras(group_size, norm_before_gate, activation, cast_to_weight, cast_scale)
        return _with_extras(x, weight, gate, eps, offset, cast_first, extras)
    return _rms_norm((x, weight) if gate is None else (x, weight, gate), (eps, offset, cast_first))


def _with_extras(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    gate: torch.Tensor | None,
    eps: float,
    offset: float,
    cast_first: bool,
    extras: Extras,
) -> torch.Tensor:
    """The operator normalises, in float32 if more is to be computed; the rest is PyTorch's own."""
    size = extras.group_size or x.shape[-1]
    if weight is None and gate is None:
        return _alone(x, size, eps)
    wide = x.float()
    factor = None if gate is None else ACTIVATIONS[extras.activation](gate.float())
    if factor is not None and not extras.norm_before_gate:
        wide, factor = wide * factor, None
    out = _alone(wide, size, eps)
    if weight is not None and cast_first:
        out = weight * out.to(weight.dtype if extras.cast_to_weight else x.dtype)
    elif weight is not None:
        out = out * (weight.float() + offset)
    if factor is not None:
        out = out * factor
    elif weight is not None and cast_first:
        return out
    return out.to(x.dtype)


def _alone(x: torch.Tensor, size: int, eps: float) -> torch.Tensor:
    """Groups of ``size`` elements of every row, normalised and not scaled."""
    if size == x.shape[-1]:
        return _rms_norm((x, x.new_ones(size)), (eps, 0.0, True))
    return _rms_norm((x.unflatten(-1, (-1, size)), x.new_ones(size)), (eps, 0.0, True)).flatten(-2)


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
