"""add_rms_norm in Triton: the sum and its norm in one pass, and one pass back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from hf_kernel_patch.ops._shared.autograd import Gradients, Options, Tensors
from hf_kernel_patch.ops._shared.fused import Backward, fused_op
from hf_kernel_patch.ops._shared.rows.norm import WIDEST_BACKWARD, backward, dtypes, forward
from hf_kernel_patch.ops.rms_norm import reference
from hf_kernel_patch.ops.rms_norm.triton import rms_norm

if TYPE_CHECKING:
    from torch.autograd.function import FunctionCtx

_OPTIONS = "float eps, float offset, bool cast_first"


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
        return _operator(x, residual, weight, eps, offset, cast_first)
    needed = x.requires_grad or residual.requires_grad or weight.requires_grad
    if needed and torch.is_grad_enabled():
        return _apply((eps, offset, cast_first), x, residual, weight)
    return _forward(x, residual, weight, eps, offset, cast_first)


def _forward(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, *options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    normed, total = forward(x, weight, residual, True, *options)
    assert total is not None
    return total, normed


def _fake(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, *options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    total, out = dtypes(x.dtype, weight.dtype, residual.dtype, True, options[-1])
    return torch.empty_like(x, dtype=total), torch.empty_like(x, dtype=out)


def _save(
    ctx: FunctionCtx,
    tensors: Tensors,
    options: Options,
    output: Tensors,
) -> None:
    """Keep the sum in place of x and the residual, which have the same gradient."""
    x, residual, weight = tensors
    ctx.save_for_backward(output[0], weight)
    ctx.options, ctx.dtypes = options, (x.dtype, residual.dtype)
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: FunctionCtx, grads: Gradients, needed: Sequence[bool], backward: Callable[..., Tensors]
) -> tuple[torch.Tensor | None, ...]:
    total, weight = ctx.saved_tensors
    through, grad_weight = grads[0], None
    if grads[1] is not None:
        through, grad_weight = backward(*grads, total, weight, *ctx.options, needed)
    summands = zip(ctx.dtypes, needed)
    made = [through.to(dtype) if need and through is not None else None for dtype, need in summands]
    return *made, grad_weight


def _backward(
    grad_total: torch.Tensor | None,
    grad: torch.Tensor,
    total: torch.Tensor,
    weight: torch.Tensor,
    *rest: Any,
) -> tuple[torch.Tensor, ...]:
    *options, needed = rest
    return backward(grad, total, weight, grad_total, False, needed[2], *options)[:2]


def _fake_backward(
    grad_total: torch.Tensor | None,
    grad: torch.Tensor,
    total: torch.Tensor,
    weight: torch.Tensor,
    *rest: Any,
) -> tuple[torch.Tensor, ...]:
    return torch.empty_like(total), torch.empty_like(weight) if rest[-1][2] else None


def _plain(total: torch.Tensor, weight: torch.Tensor, *options: Any) -> torch.Tensor:
    return total, reference.rms_norm(total, weight, *options)


_operator, _apply = fused_op(
    "add_rms_norm",
    f"(Tensor x, Tensor residual, Tensor weight, {_OPTIONS}) -> (Tensor, Tensor)",
    _forward,
    _fake,
    Backward(
        f"(Tensor? grad_total, Tensor grad, Tensor total, Tensor weight, {_OPTIONS}, "
        "bool[] needed) -> (Tensor, Tensor)",
        _backward,
        _fake_backward,
        _plain,
    ),
    save=_save,
    differentiate=_differentiate,
    depends=((0, 1), (0, 1, 2)),
)
