"""add_rms_norm in Triton: the sum and its norm in one pass, and one pass back."""

from collections.abc import Callable
from typing import Any

import torch

from hf_kernel_patch.ops.autograd import eager_gradients
from hf_kernel_patch.ops.rms_norm import reference
from hf_kernel_patch.ops.rms_norm.triton import backward_operator, rms_norm
from hf_kernel_patch.ops.rows.norm import WIDEST_BACKWARD, backward, dtypes, forward


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    offset: float = 0.0,
    cast_first: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`hf_kernel_patch.ops.add_rms_norm.reference.add_rms_norm`, in one pass."""
    if x.shape[-1] > WIDEST_BACKWARD:
        total = residual + x
        return total, rms_norm(total, weight, eps, offset, cast_first)
    if torch.compiler.is_compiling():
        return operator(x, residual, weight, eps, offset, cast_first)
    needed = x.requires_grad or residual.requires_grad or weight.requires_grad
    if needed and torch.is_grad_enabled():
        return _AddRMSNorm.apply(x, residual, weight, eps, offset, cast_first)
    return _forward(x, residual, weight, eps, offset, cast_first)


def _forward(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, *options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    normed, total = forward(x, weight, residual, True, *options)
    assert total is not None
    return total, normed


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        *options: Any,  # eps, offset, cast_first
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total, normed = _forward(x, residual, weight, *options)
        _setup(ctx, (x, residual, weight, *options), (total, normed))
        if not any(ctx.needs_input_grad[:2]):
            ctx.mark_non_differentiable(total)
        return total, normed

    @staticmethod
    def backward(ctx: Any, grad_total: torch.Tensor | None, grad: torch.Tensor | None) -> Any:
        if grad is None or not torch.is_grad_enabled():
            return _gradients(ctx, grad_total, grad, backward)
        total, weight = ctx.saved_tensors
        through, grad_weight = eager_gradients(
            lambda t, w: reference.rms_norm(t, w, *ctx.options), (total, weight), (grad,)
        )
        if grad_total is not None and through is not None:
            through = through + grad_total
        return *_to_inputs(ctx, through), grad_weight, None, None, None


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, residual, weight, *options = inputs
    ctx.save_for_backward(output[0], weight)
    ctx.options, ctx.dtypes = options, (x.dtype, residual.dtype)
    ctx.set_materialize_grads(False)


def _gradients(
    ctx: Any,
    grad_total: torch.Tensor | None,
    grad: torch.Tensor | None,
    function: Callable[..., tuple[torch.Tensor | None, ...]],
) -> Any:
    """Gradients of all inputs by ``backward`` or by the operator of it."""
    total, weight = ctx.saved_tensors
    needed, grad_weight = ctx.needs_input_grad[2], None
    if grad is not None:
        grad_total, grad_weight, _ = function(
            grad, total, weight, grad_total, False, needed, *ctx.options
        )
    return *_to_inputs(ctx, grad_total), grad_weight if needed else None, None, None, None


def _to_inputs(ctx: Any, grad: torch.Tensor | None) -> list[torch.Tensor | None]:
    """The gradient of the sum, for each of x and the residual that needs one."""
    needed = zip(ctx.dtypes, ctx.needs_input_grad)
    return [grad.to(dtype) if need and grad is not None else None for dtype, need in needed]


@torch.library.custom_op("hf_kernel_patch::add_rms_norm", mutates_args=())
def operator(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    offset: float,
    cast_first: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _forward(x, residual, weight, eps, offset, cast_first)


@operator.register_fake
def _(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    offset: float,
    cast_first: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    total, out = dtypes(x.dtype, weight.dtype, residual.dtype, True, cast_first)
    return torch.empty_like(x, dtype=total), torch.empty_like(x, dtype=out)


def _operator_backward(ctx: Any, grad_total: torch.Tensor | None, grad: torch.Tensor | None) -> Any:
    return _gradients(ctx, grad_total, grad, backward_operator)


operator.register_autograd(_operator_backward, setup_context=_setup)
