"""rms_norm by groups, without a weight, and with other gates, in Triton."""

from __future__ import annotations

from typing import Any

import torch

from hf_kernel_patch.ops._shared.fused import Backward, fused_op
from hf_kernel_patch.ops._shared.rows import norm as rows
from hf_kernel_patch.ops.rms_norm import reference
from hf_kernel_patch.ops.rms_norm.extras import Extras
from hf_kernel_patch.ops.rms_norm.triton_extras_launch import backward, forward, out_dtype

_INPUTS = (
    "Tensor x, Tensor? weight, Tensor? gate, float eps, float offset, bool cast_first, "
    "int? group_size, bool norm_before_gate, str activation, bool cast_to_weight, bool cast_scale"
)


def with_extras(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    gate: torch.Tensor | None,
    eps: float,
    offset: float,
    cast_first: bool,
    extras: Extras,
) -> torch.Tensor:
    """As :func:`hf_kernel_patch.ops.rms_norm.reference.rms_norm`; one read, one write."""
    size = extras.group_size or x.shape[-1]
    if size > rows.WIDEST_BACKWARD or (weight is None and gate is not None):
        return reference.rms_norm(x, weight, eps, offset, cast_first, gate, *extras)
    if torch.compiler.is_compiling():
        return _operator(x, weight, gate, eps, offset, cast_first, *extras)
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (gate is not None and gate.requires_grad)
    ):
        return _apply((eps, offset, cast_first, *extras), x, weight, gate)
    return forward(x, weight, gate, eps, offset, cast_first, extras)


def _forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    gate: torch.Tensor,
    eps: float,
    offset: float,
    cast_first: bool,
    *extras: Any,
) -> torch.Tensor:
    return forward(x, weight, gate, eps, offset, cast_first, Extras(*extras))


def _fake(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    gate: torch.Tensor | None,
    eps: float,
    offset: float,
    cast_first: bool,
    *extras: Any,
) -> torch.Tensor:
    weight_dtype = None if weight is None else weight.dtype
    dtype = out_dtype(x.dtype, weight_dtype, gate is not None, cast_first, Extras(*extras))
    return torch.empty_like(x, dtype=dtype)


def _backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    gate: torch.Tensor,
    eps: float,
    offset: float,
    cast_first: bool,
    *rest: Any,
) -> Any:
    *extras, needed = rest
    return backward(grad, x, weight, gate, needed[1], eps, offset, cast_first, Extras(*extras))


def _fake_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    gate: torch.Tensor | None,
    *rest: Any,
) -> Any:
    grad_weight = torch.empty_like(weight) if rest[-1][1] else None
    grad_gate = None if gate is None else torch.empty_like(x, dtype=gate.dtype)
    return torch.empty_like(x), grad_weight, grad_gate


def _plain(
    x: torch.Tensor,
    weight: torch.Tensor,
    gate: torch.Tensor,
    eps: float,
    offset: float,
    cast_first: bool,
    *extras: Any,
) -> torch.Tensor:
    return reference.rms_norm(x, weight, eps, offset, cast_first, gate, *extras)


_operator, _apply = fused_op(
    "rms_norm_extras",
    f"({_INPUTS}) -> Tensor",
    _forward,
    _fake,
    Backward(
        f"(Tensor grad, {_INPUTS}, bool[] needed) -> (Tensor, Tensor, Tensor)",
        _backward,
        _fake_backward,
        _plain,
    ),
)
