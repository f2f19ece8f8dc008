"""moe in plain PyTorch: tokens sorted by expert once, grouped products, one combine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from hf_kernel_patch.ops.moe.experts import Experts
from hf_kernel_patch.ops.moe.gated import gated
from hf_kernel_patch.ops.moe.grouped import Plan, Weights, plan_of, rows_times, takes_grouped
from hf_kernel_patch.ops.moe.reference import Down, GateUp, Gating, plain_gradients
from hf_kernel_patch.ops.swiglu.reference import activate
from hf_kernel_patch.ops.swiglu.torch import activate_backward


def moe(
    hidden: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    gate_up: GateUp,
    down: Down,
    activation: str | Gating = "silu",
) -> torch.Tensor:
    """As :func:`hf_kernel_patch.ops.moe.reference.moe`.

    Products are in hidden's dtype, the sum over a token's experts is in float32. In a list of
    experts, one that no token chose gets no gradient, as in the original.
    """
    if not isinstance(activation, str):
        assert isinstance(gate_up, torch.Tensor) and isinstance(down, torch.Tensor)
        return gated(hidden, index, weights, gate_up, down, activation)
    experts = Experts.of(gate_up, down)
    if torch.is_grad_enabled() and any(
        tensor.requires_grad for tensor in (hidden, weights, *experts.flat)
    ):
        return _MoE.apply(hidden, index, weights, activation, *experts.flat)
    plan = plan_of(index, experts.count)
    return _forward(plan, hidden, weights, experts, activation, keep=False)[0]


def _weight_gradients(
    plan: Plan, left: torch.Tensor, right: torch.Tensor, weights: Weights
) -> list[torch.Tensor | None]:
    """left^T right over every expert's rows: one stacked tensor, or one for each that is used."""
    if isinstance(weights, torch.Tensor):
        if not weights.requires_grad:
            return [None]
        if takes_grouped(left, right):
            return [F.grouped_mm(left.t(), right, offs=plan.offsets)]
        out = torch.zeros_like(weights)
        for expert, start, end in plan.groups():
            torch.mm(left[start:end].t(), right[start:end], out=out[expert])
        return [out]
    found: list[torch.Tensor | None] = [None] * len(weights)
    for expert, start, end in plan.groups():
        if weights[expert].requires_grad:
            found[expert] = left[start:end].t() @ right[start:end]
    return found


def _forward(
    plan: Plan,
    hidden: torch.Tensor,
    weights: torch.Tensor,
    experts: Experts,
    activation: str,
    keep: bool,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The output, and gate and up of every row, each (rows, I), where the backward needs them."""
    *first, second = experts.products
    x = hidden[plan.token]
    gate, up = _halves([rows_times(plan, x, weight, turn=True) for weight in first])
    inner = activate(gate, activation).mul_(up)
    out = rows_times(plan, inner, second, turn=True)
    return plan.combine(out, weights), [gate, up] if keep else []


def _halves(parts: list[torch.Tensor]) -> Sequence[torch.Tensor]:
    """Gate and up, from one product or from two."""
    return parts[0].chunk(2, dim=-1) if len(parts) == 1 else parts


class _MoE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        index: torch.Tensor,
        weights: torch.Tensor,
        activation: str,
        *flat: torch.Tensor,
    ) -> torch.Tensor:
        experts = Experts(flat)
        plan = plan_of(index, experts.count)
        out, kept = _forward(plan, hidden, weights, experts, activation, keep=True)
        ctx.save_for_backward(hidden, index, weights, *kept, *plan[:3], *flat)
        ctx.sizes, ctx.activation = plan[3:], activation
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        hidden, index, weights, gate, up, order, token, offsets, *flat = ctx.saved_tensors
        experts = Experts(flat)
        plan, activation = Plan(order, token, offsets, *ctx.sizes), ctx.activation
        if torch.is_grad_enabled():
            again = plain_gradients(grad, hidden, index, weights, activation, experts)
            return again[0], None, again[1], None, *again[2:]
        needs_hidden, _, needs_weights, _, *needs_experts = ctx.needs_input_grad
        *first, second = experts.products
        activated = activate(gate, activation)
        inner = activated * up
        grad_rows = grad[plan.token]
        row_weights = weights.reshape(-1)[plan.order].unsqueeze(-1).to(grad.dtype)
        # The gradient of inner before the routing weight, which gives the weight's own.
        back = rows_times(plan, grad_rows, second, turn=False)
        grad_weights = None
        if needs_weights:
            dot = (back * inner).sum(-1, dtype=torch.float32)
            flat = dot.new_zeros(weights.numel())
            flat[plan.order] = dot
            grad_weights = flat.view_as(weights).to(weights.dtype)
        last_grads = _weight_gradients(plan, grad_rows, inner.mul_(row_weights), second)
        if not (needs_hidden or any(needs_experts)):
            return None, None, grad_weights, None, *[None] * len(flat)
        del grad_rows, inner
        back.mul_(row_weights)
        turned = back.new_empty((len(back), 2 * back.shape[-1]))
        halves = turned.chunk(2, dim=-1)
        torch.mul(back, activated, out=halves[1])
        halves[0].copy_(activate_backward(back.mul_(up), gate, activation))
        del back, activated
        parts = [turned] if len(first) == 1 else list(halves)
        x = hidden[plan.token]
        pairs: list[tuple[torch.Tensor, Weights]] = list(zip(parts, first, strict=True))
        first_grads = [g for part, w in pairs for g in _weight_gradients(plan, part, x, w)]
        grad_hidden = None
        if needs_hidden:
            del x
            rows = [rows_times(plan, part, weight, turn=False) for part, weight in pairs]
            grad_hidden = plan.combine(rows[0] if len(rows) == 1 else rows[0].add_(rows[1]))
        return grad_hidden, None, grad_weights, None, *first_grads, *last_grads
