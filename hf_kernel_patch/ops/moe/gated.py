"""moe with a gate of the experts' own, biases or transposed weights, in plain PyTorch.

The gate is any function, so autograd goes through it; around it are functions that are derived
from each other, of any order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from hf_kernel_patch.ops.moe.grouped import Routing, grouped_product, route, takes_grouped_mm
from hf_kernel_patch.ops.moe.reference import Gating

if TYPE_CHECKING:
    from torch.autograd.function import FunctionCtx


def gated(
    hidden: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gating: Gating,
) -> torch.Tensor:
    """As :func:`hf_kernel_patch.ops.moe.reference.moe` of stacked experts with a Gating.

    The gate sees the rows of all experts at once. Products are in hidden's dtype, the sum over a
    token's experts is in float32.
    """
    routing = route(index, len(down))
    transpose = not gating.transposed
    expert = None
    if gating.gate_up_bias is not None or gating.down_bias is not None:
        expert = index.reshape(-1)[routing.pairs]
    rows = _dispatch(hidden, routing)
    rows = _add_bias(
        _product(rows, gate_up, transpose, routing), gating.gate_up_bias, expert, routing
    )
    rows = gating.gate(rows).to(down.dtype)
    rows = _add_bias(_product(rows, down, transpose, routing), gating.down_bias, expert, routing)
    if gating.after is not None:
        rows = gating.after(rows)
    return routing.combine(rows, weights)


def _needed(*tensors: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _dispatch(hidden: torch.Tensor, routing: Routing) -> torch.Tensor:
    """(T, H) -> (rows, H)."""
    return _Dispatch.apply(hidden, routing) if _needed(hidden) else hidden[routing.tokens]


def _combine(rows: torch.Tensor, routing: Routing) -> torch.Tensor:
    """(rows, H) -> (T, H), the sums of every token's rows."""
    return _Combine.apply(rows, routing) if _needed(rows) else routing.combine(rows)


def _product(
    rows: torch.Tensor, weights: torch.Tensor, transpose: bool, routing: Routing
) -> torch.Tensor:
    """Every row times its expert's weight, transposed if ``transpose``."""
    if _needed(rows, weights):
        return _Product.apply(rows, weights, transpose, routing)
    return grouped_product(routing, rows, weights, transpose)


def _outer_product(left: torch.Tensor, right: torch.Tensor, routing: Routing) -> torch.Tensor:
    """(E, M, N): left^T right over the rows (rows, M) and (rows, N) of every expert."""
    if _needed(left, right):
        return _OuterProduct.apply(left, right, routing)
    if takes_grouped_mm(left, right):
        return F.grouped_mm(left.t(), right, offs=routing.ends)
    out = left.new_zeros(len(routing.ends), left.shape[1], right.shape[1])
    for expert, start, end in routing.groups():
        torch.mm(left[start:end].t(), right[start:end], out=out[expert])
    return out


def _add_bias(
    rows: torch.Tensor, bias: torch.Tensor | None, expert: torch.Tensor | None, routing: Routing
) -> torch.Tensor:
    """Rows, which nobody else has, with their expert's bias (E, N) added to each."""
    if bias is None:
        return rows
    return _AddBias.apply(rows, bias, expert, routing) if _needed(bias) else rows.add_(bias[expert])


def _save(ctx: FunctionCtx, routing: Routing, *tensors: torch.Tensor) -> None:
    ctx.save_for_backward(*tensors, *routing[:3])
    ctx.sizes = routing[3:]


def _saved(ctx: FunctionCtx) -> tuple[list[torch.Tensor], Routing]:
    *tensors, pairs, tokens, ends = ctx.saved_tensors
    return tensors, Routing(pairs, tokens, ends, *ctx.sizes)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, hidden: torch.Tensor, routing: Routing) -> torch.Tensor:
        _save(ctx, routing)
        return hidden[routing.tokens]

    @staticmethod
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _combine(grad, _saved(ctx)[1]), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, rows: torch.Tensor, routing: Routing) -> torch.Tensor:
        _save(ctx, routing)
        return routing.combine(rows)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _dispatch(grad, _saved(ctx)[1]), None


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        rows: torch.Tensor,
        weights: torch.Tensor,
        transpose: bool,
        routing: Routing,
    ) -> torch.Tensor:
        _save(ctx, routing, rows, weights)
        ctx.transpose = transpose
        return grouped_product(routing, rows, weights, transpose)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (rows, weights), routing = _saved(ctx)
        grad = grad.contiguous()
        grad_rows = grad_weights = None
        if ctx.needs_input_grad[0]:
            grad_rows = _product(grad, weights, not ctx.transpose, routing)
        if ctx.needs_input_grad[1]:
            left, right = (grad, rows) if ctx.transpose else (rows, grad)
            grad_weights = _outer_product(left, right, routing)
        return grad_rows, grad_weights, None, None


class _OuterProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, left: torch.Tensor, right: torch.Tensor, routing: Routing
    ) -> torch.Tensor:
        _save(ctx, routing, left, right)
        return _outer_product(left, right, routing)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (left, right), routing = _saved(ctx)
        grad = grad.contiguous()
        grad_left = _product(right, grad, True, routing) if ctx.needs_input_grad[0] else None
        grad_right = _product(left, grad, False, routing) if ctx.needs_input_grad[1] else None
        return grad_left, grad_right, None


class _AddBias(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        rows: torch.Tensor,
        bias: torch.Tensor,
        expert: torch.Tensor,
        routing: Routing,
    ) -> torch.Tensor:
        _save(ctx, routing)
        return rows + bias[expert]

    @staticmethod
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        _, routing = _saved(ctx)
        # The sum of every expert's rows, as a product with ones, which are whole 16 bytes.
        ones = grad.new_ones(len(grad), 16 // grad.element_size())
        return grad, _outer_product(ones, grad.contiguous(), routing)[:, 0], None, None
