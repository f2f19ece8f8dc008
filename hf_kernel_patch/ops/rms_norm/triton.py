"""rms_norm in Triton.

Eager calls launch without torch's dispatcher; torch.compile sees operators of the dispatcher.
"""

from collections.abc import Callable
from typing import Any

import torch

from hf_kernel_patch.ops.autograd import eager_gradients
from hf_kernel_patch.ops.rms_norm import reference
from hf_kernel_patch.ops.rms_norm.extras import Extras
from hf_kernel_patch.ops.rms_norm.triton_extras import with_extras
from hf_kernel_patch.ops.rows.norm import (
    WIDEST_BACKWARD,
    backward,
    dtypes,
    empty_gradients,
    forward,
)


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
        return operator(x, weight, gate, eps, offset, cast_first)
    tracked = x.requires_grad or weight.requires_grad or (gate is not None and gate.requires_grad)
    if tracked and torch.is_grad_enabled():
        return _RMSNorm.apply(x, weight, gate, eps, offset, cast_first)
    return forward(x, weight, gate, False, eps, offset, cast_first)[0]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        gate: torch.Tensor | None,
        *options: Any,  # eps, offset, cast_first
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight, gate)
        ctx.options = options
        return forward(x, weight, gate, False, *options)[0]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, weight, gate = ctx.saved_tensors
        if torch.is_grad_enabled():
            function, tensors = _plain(*ctx.options), (x, weight)
            again = eager_gradients(
                function, (*tensors, *(() if gate is None else (gate,))), (grad,)
            )
            return *again, *(None,) * (6 - len(again))
        needed = ctx.needs_input_grad[1]
        grads = backward(grad, x, weight, gate, gate is not None, needed, *ctx.options)
        return *grads, None, None, None


def _plain(eps: float, offset: float, cast_first: bool) -> Callable[..., torch.Tensor]:
    """The same in plain PyTorch, for gradients of gradients."""

    def function(x: torch.Tensor, weight: torch.Tensor, *gate: torch.Tensor) -> torch.Tensor:
        return reference.rms_norm(x, weight, eps, offset, cast_first, *gate)

    return function


@torch.library.custom_op("hf_kernel_patch::rms_norm", mutates_args=())
def operator(
    x: torch.Tensor,
    weight: torch.Tensor,
    gate: torch.Tensor | None,
    eps: float,
    offset: float,
    cast_first: bool,
) -> torch.Tensor:
    return forward(x, weight, gate, False, eps, offset, cast_first)[0]


@operator.register_fake
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    gate: torch.Tensor | None,
    eps: float,
    offset: float,
    cast_first: bool,
) -> torch.Tensor:
    gated = None if gate is None else gate.dtype
    return torch.empty_like(x, dtype=dtypes(x.dtype, weight.dtype, gated, False, cast_first)[1])


@torch.library.custom_op("hf_kernel_patch::rms_norm_backward", mutates_args=())
def backward_operator(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    other: torch.Tensor | None,
    gated: bool,
    with_weight: bool,
    eps: float,
    offset: float,
    cast_first: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As ``backward``, with empty tensors for None."""
    grads = backward(grad, x, weight, other, gated, with_weight, eps, offset, cast_first)
    grad_x, *rest = grads
    first, second = (x.new_empty(0) if grad is None else grad for grad in rest)
    return grad_x, first, second


@backward_operator.register_fake
def _(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    other: torch.Tensor | None,
    gated: bool,
    with_weight: bool,
    eps: float,
    offset: float,
    cast_first: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grads = empty_gradients(x, weight, other if gated else None)
    grad_x, grad_weight, grad_gate = grads
    none = x.new_empty(0)
    grad_gate = x.new_empty(0) if grad_gate is None else grad_gate
    return grad_x, grad_weight if with_weight else none, grad_gate


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, gate, *options = inputs
    ctx.save_for_backward(x, weight, gate)
    ctx.options = options


def _operator_backward(ctx: Any, grad: torch.Tensor) -> Any:
    x, weight, gate = ctx.saved_tensors
    gated, with_weight = gate is not None, ctx.needs_input_grad[1]
    grads = backward_operator(grad, x, weight, gate, gated, with_weight, *ctx.options)
    needed = True, with_weight, gated
    return *(grad if there else None for grad, there in zip(grads, needed)), None, None, None


operator.register_autograd(_operator_backward, setup_context=_setup)
