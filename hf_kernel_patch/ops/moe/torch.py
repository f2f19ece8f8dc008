"""moe in plain PyTorch: tokens sorted by expert once, grouped products, one combine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from hf_kernel_patch.ops.moe.experts import Experts
from hf_kernel_patch.ops.moe.gated import gated
from hf_kernel_patch.ops.moe.grouped import (
    Routing,
    Weights,
    grouped_product,
    route,
    takes_grouped_mm,
)
from hf_kernel_patch.ops.moe.reference import Down, GateUp, Gating, plain_gradients
from hf_kernel_patch.ops.swiglu.reference import activate
from hf_kernel_patch.ops.swiglu.torch import activate_backward

if TYPE_CHECKING:
    from torch.autograd.function import FunctionCtx


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
    routing = route(index, experts.count)
    return _forward(routing, hidden, weights, experts, activation, keep=False)[0]


def _weight_gradients(
    routing: Routing, left: torch.Tensor, right: torch.Tensor, weights: Weights
) -> list[torch.Tensor | None]:
    """left^T right over every expert's rows: one stacked tensor, or one for each that is used."""
    if isinstance(weights, torch.Tensor):
        if not weights.requires_grad:
            return [None]
        if takes_grouped_mm(left, right):
            return [F.grouped_mm(left.t(), right, offs=routing.ends)]
        out = torch.zeros_like(weights)
        for expert, start, end in routing.groups():
            torch.mm(left[start:end].t(), right[start:end], out=out[expert])
        return [out]
    grads: list[torch.Tensor | None] = [None] * len(weights)
    for expert, start, end in routing.groups():
        if weights[expert].requires_grad:
            grads[expert] = left[start:end].t() @ right[start:end]
    return grads


def _forward(
    routing: Routing,
    hidden: torch.Tensor,
    weights: torch.Tensor,
    experts: Experts,
    activation: str,
    keep: bool,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The output, and gate and up of every row, each (rows, I), where the backward needs them."""
    *first, second = experts.products
    rows = hidden[routing.tokens]
    gate, up = _halves([grouped_product(routing, rows, weight, transpose=True) for weight in first])
    inner = activate(gate, activation).mul_(up)
    rows = grouped_product(routing, inner, second, transpose=True)
    return routing.combine(rows, weights), [gate, up] if keep else []


def _halves(parts: list[torch.Tensor]) -> Sequence[torch.Tensor]:
    """Gate and up, from one product or from two."""
    return parts[0].chunk(2, dim=-1) if len(parts) == 1 else parts


class _MoE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: torch.Tensor,
        index: torch.Tensor,
        weights: torch.Tensor,
        activation: str,
        *flat: torch.Tensor,
    ) -> torch.Tensor:
        experts = Experts(flat)
        routing = route(index, experts.count)
        out, kept = _forward(routing, hidden, weights, experts, activation, keep=True)
        ctx.save_for_backward(hidden, index, weights, *kept, *routing[:3], *flat)
        ctx.sizes, ctx.activation = routing[3:], activation
        return out

    @staticmethod
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, index, weights, gate, up, pairs, tokens, ends, *flat = ctx.saved_tensors
        experts = Experts(flat)
        routing, activation = Routing(pairs, tokens, ends, *ctx.sizes), ctx.activation
        if torch.is_grad_enabled():
            again = plain_gradients(grad, hidden, index, weights, activation, experts)
            return again[0], None, again[1], None, *again[2:]
        needs_hidden, _, needs_weights, _, *needs_experts = ctx.needs_input_grad
        *first, second = experts.products
        activated = activate(gate, activation)
        inner = activated * up
        grad_rows = grad[routing.tokens]
        row_weights = weights.reshape(-1)[routing.pairs].unsqueeze(-1).to(grad.dtype)
        # The gradient of inner before the routing weight, which gives the weight's own.
        back = grouped_product(routing, grad_rows, second, transpose=False)
        grad_weights = None
        if needs_weights:
            dots = (back * inner).sum(-1, dtype=torch.float32)
            by_pair = dots.new_zeros(weights.numel())
            by_pair[routing.pairs] = dots
            grad_weights = by_pair.view_as(weights).to(weights.dtype)
        last_grads = _weight_gradients(routing, grad_rows, inner.mul_(row_weights), second)
        if not (needs_hidden or any(needs_experts)):
            return None, None, grad_weights, None, *[None] * len(flat)
        del grad_rows, inner
        back.mul_(row_weights)
        # Gate's and up's side by side: one product takes both where the weights are stacked.
        grad_gate_up = back.new_empty((len(back), 2 * back.shape[-1]))
        grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
        torch.mul(back, activated, out=grad_up)
        grad_gate.copy_(activate_backward(back.mul_(up), gate, activation))
        del back, activated
        grads = [grad_gate_up] if len(first) == 1 else [grad_gate, grad_up]
        rows = hidden[routing.tokens]
        first_grads = [
            weight_grad
            for grad, weight in zip(grads, first, strict=True)
            for weight_grad in _weight_gradients(routing, grad, rows, weight)
        ]
        grad_hidden = None
        if needs_hidden:
            del rows
            sums = [
                grouped_product(routing, grad, weight, transpose=False)
                for grad, weight in zip(grads, first, strict=True)
            ]
            grad_hidden = routing.combine(sums[0] if len(sums) == 1 else sums[0].add_(sums[1]))
        return grad_hidden, None, grad_weights, None, *first_grads, *last_grads
