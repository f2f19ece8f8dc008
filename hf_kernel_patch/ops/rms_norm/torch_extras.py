"""rms_norm by groups, without a weight, and with other gates, in plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch

from hf_kernel_patch.ops._shared.autograd import Gradients, Tensors, differentiable
from hf_kernel_patch.ops.rms_norm import reference
from hf_kernel_patch.ops.rms_norm.extras import Extras

_Given = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]


def with_extras(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    gate: torch.Tensor | None,
    eps: float,
    offset: float,
    cast_first: bool,
    extras: Extras,
) -> torch.Tensor:
    """As :func:`hf_kernel_patch.ops.rms_norm.reference.rms_norm`, bit for bit in the forward."""
    tensors = tuple(tensor for tensor in (x, weight, gate) if tensor is not None)
    return _rms_norm(tensors, (eps, offset, cast_first, extras, weight is not None))


def given(tensors: Tensors, options: tuple[Any, ...]) -> _Given:
    """x, the weight and the gate; None for one that is not there."""
    x, *rest = tensors
    weight = rest.pop(0) if options[4] else None
    return x, weight, rest[0] if rest else None


def plain(tensors: Tensors, options: tuple[Any, ...]) -> torch.Tensor:
    """The reference, of the tensors and (eps, offset, cast_first, extras, has a weight)."""
    x, weight, gate = given(tensors, options)
    eps, offset, cast_first, extras, _ = options
    return reference.rms_norm(x, weight, eps, offset, cast_first, gate, *extras)


def _grouped(x: torch.Tensor, extras: Extras) -> torch.Tensor:
    """(..., H) as (..., groups, group size); as it is where a group is the row."""
    return x if extras.group_size is None else x.unflatten(-1, (-1, extras.group_size))


def _joined(x: torch.Tensor, extras: Extras) -> torch.Tensor:
    return x if extras.group_size is None else x.flatten(-2)


def _scaled(
    normed: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None, options: tuple[Any, ...]
) -> torch.Tensor:
    """The normalised x, float32, times the weight, rounded as before a gate."""
    _, offset, cast_first, extras, _ = options
    if weight is None:
        return normed
    if cast_first:
        return weight * normed.to(weight.dtype if extras.cast_to_weight else x.dtype)
    return normed * (weight.float() + offset if offset else weight)


def _forward(tensors: Tensors, options: tuple[Any, ...]) -> tuple[torch.Tensor, Tensors]:
    x, weight, gate = given(tensors, options)
    eps, _, cast_first, extras, _ = options
    wide = x.float()
    factor = None if gate is None else reference.ACTIVATIONS[extras.activation](gate.float())
    if factor is not None and not extras.norm_before_gate:
        wide, factor = wide * factor, None
    wide = _grouped(wide, extras)
    rstd = wide.pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()
    if extras.cast_scale:
        rstd = rstd.to(x.dtype).float()
    out = _scaled(_joined(wide * rstd, extras), x, weight, options)
    if factor is not None:
        out = factor.mul_(out)
    elif cast_first and weight is not None:
        return out, (rstd,)
    return out.to(x.dtype), (rstd,)


def _backward(
    grad: torch.Tensor,
    tensors: Tensors,
    kept: Tensors,
    options: tuple[Any, ...],
    needed: tuple[bool, ...],
) -> Gradients:
    x, weight, gate = given(tensors, options)
    (rstd,) = kept
    _, offset, _, extras, weighted = options
    need_x, need_weight, need_gate = needed[0], weighted and needed[1], needed[-1]
    grad, wide = grad.float(), x.float()
    grad_x = grad_weight = grad_gate = None
    wide_gate = factor = None
    if gate is not None:
        wide_gate = gate.float()
        factor = reference.ACTIVATIONS[extras.activation](wide_gate)
    first = factor is not None and not extras.norm_before_gate
    normed = _grouped(wide * factor if first else wide, extras) * rstd
    flat = _joined(normed, extras)
    if factor is not None and not first:
        if need_gate:
            out = _scaled(flat, x, weight, options)
            grad_gate = _through(extras.activation, grad * out, wide_gate, factor)
        grad = grad * factor
    if need_weight:
        grad_weight = (grad * flat).reshape(-1, x.shape[-1]).sum(0)
    if need_x or (first and need_gate):
        # d(x rstd) = rstd (g - normed mean(g normed)), with g the gradient of the normed x
        if weight is not None:
            grad = grad * (weight.float() + offset if offset else weight)
        scaled = _grouped(grad, extras)
        mean = (scaled * normed).mean(-1, keepdim=True)
        grad_x = _joined((scaled - normed.mul_(mean)).mul_(rstd), extras)
        if first:
            if need_gate:
                grad_gate = _through(extras.activation, grad_x * wide, wide_gate, factor)
            grad_x = grad_x * factor
    found = (grad_x, *((grad_weight,) if weighted else ()), grad_gate)
    return [
        one.to(tensor.dtype) if need and one is not None else None
        for one, tensor, need in zip(found, tensors, needed)
    ]


def _through(
    activation: str, grad: torch.Tensor, gate: torch.Tensor | None, factor: torch.Tensor
) -> torch.Tensor:
    """The gradient of the gate, given that of the factor that its activation made of it."""
    if activation == "silu":
        return torch.ops.aten.silu_backward(grad, gate)
    return torch.ops.aten.sigmoid_backward(grad, factor)


_rms_norm = differentiable(_forward, _backward, plain)
