"""moe with a gate of the experts' own, biases or transposed weights, in plain PyTorch.

The gate is any function, so autograd goes through it; around it are functions that are derived
from each other, of any order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from hf_kernel_patch.ops.moe.grouped import Plan, plan_of, rows_times, takes_grouped
from hf_kernel_patch.ops.moe.reference import Gating


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
    plan = plan_of(index, len(down))
    turn = not gating.transposed
    expert = None
    if gating.gate_up_bias is not None or gating.down_bias is not None:
        expert = index.reshape(-1)[plan.order]
    rows = _spread(hidden, plan)
    rows = _biased(_times(rows, gate_up, turn, plan), gating.gate_up_bias, expert, plan)
    rows = gating.gate(rows).to(down.dtype)
    rows = _biased(_times(rows, down, turn, plan), gating.down_bias, expert, plan)
    if gating.after is not None:
        rows = gating.after(rows)
    return plan.combine(rows, weights)


def _needed(*tensors: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _spread(hidden: torch.Tensor, plan: Plan) -> torch.Tensor:
    """(T, H) -> (rows, H)."""
    return _Spread.apply(hidden, plan) if _needed(hidden) else hidden[plan.token]


def _gathered(rows: torch.Tensor, plan: Plan) -> torch.Tensor:
    """(rows, H) -> (T, H), the sums of every token's rows."""
    return _Gathered.apply(rows, plan) if _needed(rows) else plan.combine(rows)


def _times(rows: torch.Tensor, weights: torch.Tensor, turn: bool, plan: Plan) -> torch.Tensor:
    """Every row times its expert's weight, transposed if ``turn``."""
    if _needed(rows, weights):
        return _Times.apply(rows, weights, turn, plan)
    return rows_times(plan, rows, weights, turn)


def _outer(left: torch.Tensor, right: torch.Tensor, plan: Plan) -> torch.Tensor:
    """(E, M, N): left^T right over the rows (rows, M) and (rows, N) of every expert."""
    if _needed(left, right):
        return _Outer.apply(left, right, plan)
    if takes_grouped(left, right):
        return F.grouped_mm(left.t(), right, offs=plan.offsets)
    out = left.new_zeros(len(plan.offsets), left.shape[1], right.shape[1])
    for expert, start, end in plan.groups():
        torch.mm(left[start:end].t(), right[start:end], out=out[expert])
    return out


def _biased(
    rows: torch.Tensor, bias: torch.Tensor | None, expert: torch.Tensor | None, plan: Plan
) -> torch.Tensor:
    """Rows, which nobody else has, with their expert's bias (E, N) added to each."""
    if bias is None:
        return rows
    return _Biased.apply(rows, bias, expert, plan) if _needed(bias) else rows.add_(bias[expert])


def _keep(ctx: Any, plan: Plan, *tensors: torch.Tensor) -> None:
    ctx.save_for_backward(*tensors, *plan[:3])
    ctx.sizes = plan[3:]


def _kept(ctx: Any) -> tuple[list[torch.Tensor], Plan]:
    *tensors, order, token, offsets = ctx.saved_tensors
    return tensors, Plan(order, token, offsets, *ctx.sizes)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, plan: Plan) -> torch.Tensor:
        _keep(ctx, plan)
        return hidden[plan.token]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return _gathered(grad, _kept(ctx)[1]), None


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, plan: Plan) -> torch.Tensor:
        _keep(ctx, plan)
        return plan.combine(rows)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return _spread(grad, _kept(ctx)[1]), None


class _Times(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, weights: torch.Tensor, turn: bool, plan: Plan
    ) -> torch.Tensor:
        _keep(ctx, plan, rows, weights)
        ctx.turn = turn
        return rows_times(plan, rows, weights, turn)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        (rows, weights), plan = _kept(ctx)
        grad = grad.contiguous()
        grad_rows = grad_weights = None
        if ctx.needs_input_grad[0]:
            grad_rows = _times(grad, weights, not ctx.turn, plan)
        if ctx.needs_input_grad[1]:
            left, right = (grad, rows) if ctx.turn else (rows, grad)
            grad_weights = _outer(left, right, plan)
        return grad_rows, grad_weights, None, None


class _Outer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, left: torch.Tensor, right: torch.Tensor, plan: Plan) -> torch.Tensor:
        _keep(ctx, plan, left, right)
        return _outer(left, right, plan)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        (left, right), plan = _kept(ctx)
        grad = grad.contiguous()
        grad_left = _times(right, grad, True, plan) if ctx.needs_input_grad[0] else None
        grad_right = _times(left, grad, False, plan) if ctx.needs_input_grad[1] else None
        return grad_left, grad_right, None


class _Biased(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, bias: torch.Tensor, expert: torch.Tensor, plan: Plan
    ) -> torch.Tensor:
        _keep(ctx, plan)
        return rows + bias[expert]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        _, plan = _kept(ctx)
        # The sum of every expert's rows, as a product with ones, which are whole 16 bytes.
        ones = grad.new_ones(len(grad), 16 // grad.element_size())
        return grad, _outer(ones, grad.contiguous(), plan)[:, 0], None, None
