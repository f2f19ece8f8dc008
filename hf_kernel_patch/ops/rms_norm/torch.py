"""rms_norm in plain PyTorch: the original's forward, and a backward of fewer passes."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from hf_kernel_patch.ops._shared.autograd import Gradients, Tensors, differentiable
from hf_kernel_patch.ops.rms_norm import reference
from hf_kernel_patch.ops.rms_norm.extras import Extras
from hf_kernel_patch.ops.rms_norm.torch_extras import with_extras


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
    """As :func:`hf_kernel_patch.ops.rms_norm.reference.rms_norm`, bit for bit in the forward."""
    if (
        weight is None
        or group_size is not None
        or cast_to_weight
        or cast_scale
        or (gate is not None and not (cast_first and norm_before_gate and activation == "silu"))
    ):
        extras = Extras(group_size, norm_before_gate, activation, cast_to_weight, cast_scale)
        return with_extras(x, weight, gate, eps, offset, cast_first, extras)
    return _rms_norm((x, weight) if gate is None else (x, weight, gate), (eps, offset, cast_first))


def plain(tensors: Tensors, options: tuple[Any, ...]) -> torch.Tensor:
    """The reference, of (x, weight) or (x, weight, gate) and (eps, offset, cast_first)."""
    return reference.rms_norm(*tensors[:2], *options, *tensors[2:])


def _forward(tensors: Tensors, options: tuple[Any, ...]) -> tuple[torch.Tensor, Tensors]:
    x, weight, *gate = tensors
    eps, offset, cast_first = options
    wide = x.float()
    rstd = wide.pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()
    out = _scaled(wide * rstd, x.dtype, weight, offset, cast_first)
    if gate:
        out = F.silu(gate[0].float()).mul_(out).to(x.dtype)
    return out, (rstd,)


def _scaled(
    normed: torch.Tensor, dtype: torch.dtype, weight: torch.Tensor, offset: float, cast_first: bool
) -> torch.Tensor:
    """The normalised x, float32, times the weight; ``dtype`` is x's. May overwrite ``normed``."""
    if not cast_first:
        return normed.mul_(weight.float() + offset if offset else weight).to(dtype)
    normed = normed.to(dtype)
    return normed.mul_(weight) if dtype == weight.dtype else weight * normed


def _backward(
    grad: torch.Tensor,
    tensors: Tensors,
    kept: Tensors,
    options: tuple[Any, ...],
    needed: tuple[bool, ...],
) -> Gradients:
    x, weight, *gate = tensors
    (rstd,) = kept
    _, offset, cast_first = options
    normed = x.float() * rstd
    grad = grad.float()
    grads: list[torch.Tensor | None] = [None] * len(tensors)
    if gate:
        wide = gate[0].float()
        if needed[2]:
            out = _scaled(normed.clone(), x.dtype, weight, offset, cast_first)
            grads[2] = torch.ops.aten.silu_backward(grad * out, wide).to(gate[0].dtype)
        grad = F.silu(wide).mul_(grad)
    if needed[1]:
        grads[1] = (grad * normed).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
    if needed[0]:
        # d(x rstd) = rstd (g - normed mean(g normed)), with g the gradient of the normed x
        scaled = grad * (weight.float() + offset if offset else weight)
        mean = (scaled * normed).mean(-1, keepdim=True)
        grads[0] = scaled.sub_(normed.mul_(mean)).mul_(rstd).to(x.dtype)
    return grads


_rms_norm = differentiable(_forward, _backward, plain)
