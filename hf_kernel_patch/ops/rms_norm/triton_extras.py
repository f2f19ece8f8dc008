"""rms_norm by groups, without a weight, and with other gates, in Triton."""

from __future__ import annotations

from typing import Any

import torch

from hf_kernel_patch.ops.autograd import Gradients, Tensors, differentiable
from hf_kernel_patch.ops.rms_norm import reference
from hf_kernel_patch.ops.rms_norm.extras import Extras
from hf_kernel_patch.ops.rms_norm.torch_extras import given, plain
from hf_kernel_patch.ops.rms_norm.triton_extras_launch import backward, forward, out_dtype
from hf_kernel_patch.ops.rows import norm as rows


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
        return operator(x, weight, gate, eps, offset, cast_first, *extras)
    tensors = tuple(tensor for tensor in (x, weight, gate) if tensor is not None)
    return _rms_norm(tensors, (eps, offset, cast_first, extras, weight is not None))


def _forward(tensors: Tensors, options: tuple[Any, ...]) -> tuple[torch.Tensor, Tensors]:
    return forward(*given(tensors, options), *options[:4]), ()


def _backward(
    grad: torch.Tensor,
    tensors: Tensors,
    kept: Tensors,
    options: tuple[Any, ...],
    needed: tuple[bool, ...],
) -> Gradients:
    x, weight, gate = given(tensors, options)
    found = backward(grad, x, weight, gate, weight is not None and needed[1], *options[:4])
    grad_x, grad_weight, grad_gate = found
    there = [grad_x, *(() if weight is None else (grad_weight,))]
    return there if gate is None else [*there, grad_gate]


_rms_norm = differentiable(_forward, _backward, plain)


@torch.library.custom_op("hf_kernel_patch::rms_norm_extras", mutates_args=())
def operator(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    gate: torch.Tensor | None,
    eps: float,
    offset: float,
    cast_first: bool,
    group_size: int | None,
    norm_before_gate: bool,
    activation: str,
    cast_to_weight: bool,
    cast_scale: bool,
) -> torch.Tensor:
    extras = Extras(group_size, norm_before_gate, activation, cast_to_weight, cast_scale)
    return forward(x, weight, gate, eps, offset, cast_first, extras)


@operator.register_fake
def _(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    gate: torch.Tensor | None,
    eps: float,
    offset: float,
    cast_first: bool,
    *extras: Any,
) -> torch.Tensor:
    kind = None if weight is None else weight.dtype
    dtype = out_dtype(x.dtype, kind, gate is not None, cast_first, Extras(*extras))
    return torch.empty_like(x, dtype=dtype)


@torch.library.custom_op("hf_kernel_patch::rms_norm_extras_backward", mutates_args=())
def backward_operator(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    gate: torch.Tensor | None,
    with_weight: bool,
    eps: float,
    offset: float,
    cast_first: bool,
    group_size: int | None,
    norm_before_gate: bool,
    activation: str,
    cast_to_weight: bool,
    cast_scale: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As ``backward``, with empty tensors for None."""
    extras = Extras(group_size, norm_before_gate, activation, cast_to_weight, cast_scale)
    found = backward(grad, x, weight, gate, with_weight, eps, offset, cast_first, extras)
    first, second, third = (x.new_empty(0) if one is None else one for one in found)
    return first, second, third


@backward_operator.register_fake
def _(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    gate: torch.Tensor | None,
    with_weight: bool,
    *options: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    none = x.new_empty(0)
    grad_weight = torch.empty_like(weight) if weight is not None and with_weight else none
    grad_gate = none if gate is None else torch.empty_like(x, dtype=gate.dtype)
    return torch.empty_like(x), grad_weight, grad_gate


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, gate, *options = inputs
    ctx.save_for_backward(x, weight, gate)
    ctx.options = options


def _operator_backward(ctx: Any, grad: torch.Tensor) -> Any:
    x, weight, gate = ctx.saved_tensors
    with_weight = ctx.needs_input_grad[1]
    found = backward_operator(grad, x, weight, gate, with_weight, *ctx.options)
    there = True, with_weight, gate is not None
    grads = [one if needed else None for one, needed in zip(found, there)]
    return *grads, *(None,) * len(ctx.options)


operator.register_autograd(_operator_backward, setup_context=_setup)
