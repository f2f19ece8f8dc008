"""rms_norm in Triton."""

from __future__ import annotations

from typing import Any

import torch

from hf_kernel_patch.ops._shared.fused import Backward, fused_op
from hf_kernel_patch.ops._shared.rows.norm import (
    WIDEST_BACKWARD,
    backward,
    dtypes,
    empty_gradients,
    forward,
)
from hf_kernel_patch.ops.rms_norm import reference
from hf_kernel_patch.ops.rms_norm.extras import Extras
from hf_kernel_patch.ops.rms_norm.triton_extras import with_extras

_INPUTS = "Tensor x, Tensor weight, Tensor? gate, float eps, float offset, bool cast_first"


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
    """As :func:`hf_kernel_patch.ops.rms_norm.reference.rms_norm`; one read, one write."""
    if (
        weight is None
        or group_size is not None
        or cast_to_weight
        or cast_scale
        or (gate is not None and not (cast_first and norm_before_gate and activation == "silu"))
    ):
        extras = Extras(group_size, norm_before_gate, activation, cast_to_weight, cast_scale)
        return with_extras(x, weight, gate, eps, offset, cast_first, extras)
    if gate is not None and x.shape[-1] > WIDEST_BACKWARD:
        return reference.rms_norm(x, weight, eps, offset, cast_first, gate)
    if torch.compiler.is_compiling():
        return _operator(x, weight, gate, eps, offset, cast_first)
    tracked = x.requires_grad or weight.requires_grad or (gate is not None and gate.requires_grad)
    if tracked and torch.is_grad_enabled():
        return _apply((eps, offset, cast_first), x, weight, gate)
    return forward(x, weight, gate, False, eps, offset, cast_first)[0]


def _forward(
    x: torch.Tensor, weight: torch.Tensor, gate: torch.Tensor, *options: Any
) -> torch.Tensor:
    return forward(x, weight, gate, False, *options)[0]


def _fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    gate: torch.Tensor | None,
    eps: float,
    offset: float,
    cast_first: bool,
) -> torch.Tensor:
    gated = None if gate is None else gate.dtype
    return torch.empty_like(x, dtype=dtypes(x.dtype, weight.dtype, gated, False, cast_first)[1])


def _backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, gate: torch.Tensor | None, *rest: Any
) -> Any:
    *options, needed = rest
    return backward(grad, x, weight, gate, gate is not None, needed[1], *options)


def _fake_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, gate: torch.Tensor, *rest: Any
) -> Any:
    grad_x, grad_weight, grad_gate = empty_gradients(x, weight, gate)
    return grad_x, grad_weight if rest[-1][1] else None, grad_gate


def _plain(
    x: torch.Tensor, weight: torch.Tensor, gate: torch.Tensor, *options: Any
) -> torch.Tensor:
    eps, offset, cast_first = options
    return reference.rms_norm(x, weight, eps, offset, cast_first, gate)


_operator, _apply = fused_op(
    "rms_norm",
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
