"""moe in plain PyTorch: tokens sorted by expert once, two products an expert, one combine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from hf_kernel_patch.ops.autograd import eager_gradients
from hf_kernel_patch.ops.moe import reference
from hf_kernel_patch.ops.moe.reference import Down, GateUp
from hf_kernel_patch.ops.swiglu.torch import activate, activate_backward


def moe(
    hidden: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    gate_up: GateUp,
    down: Down,
    activation: str = "silu",
) -> torch.Tensor:
    """As :func:`hf_kernel_patch.ops.moe.reference.moe`.

    Products are in hidden's dtype, the sum over a token's experts is in float32. An expert that
    no token chose costs nothing and, in a list of experts, gets no gradient, as in the original.
    """
    experts = _flat(gate_up, down)
    if torch.is_grad_enabled() and any(
        tensor.requires_grad for tensor in (hidden, weights, *experts)
    ):
        return _MoE.apply(hidden, index, weights, activation, *experts)
    plan = _Plan(index, _count(experts))
    return _forward(plan, hidden, weights, experts, activation, keep=False)[0]


def _flat(gate_up: GateUp, down: Down) -> tuple[torch.Tensor, ...]:
    """(gate_up, down) stacked, or (gates..., ups..., downs...) of a list of experts."""
    if isinstance(gate_up, torch.Tensor):
        assert isinstance(down, torch.Tensor)
        return gate_up, down
    return *(gate for gate, _ in gate_up), *(up for _, up in gate_up), *down


def _count(experts: Sequence[torch.Tensor]) -> int:
    return len(experts[0]) if len(experts) == 2 else len(experts) // 3


class _Plan:
    """Which rows of the sorted (token, expert) pairs belong to which expert.

    ``order`` lists the pairs (T * K) by expert, those of no expert here left out; ``token`` is
    their token; ``groups`` the (expert, first row, last row + 1) with any row.
    """

    def __init__(self, index: torch.Tensor, experts: int):
        flat = index.reshape(-1)
        self.slots = index.shape[-1]
        order = torch.argsort(flat, stable=True)
        counts = torch.bincount(flat, minlength=experts)[:experts].tolist()
        self.groups = []
        row = 0
        for expert, count in enumerate(counts):
            if count:
                self.groups.append((expert, row, row + count))
                row += count
        self.order = order[:row]
        self.token = self.order // self.slots

    def combine(
        self, rows: torch.Tensor, weights: torch.Tensor | None, tokens: int
    ) -> torch.Tensor:
        """(rows, H) -> (T, H): the weighted sum of every token's rows, in float32 within."""
        pairs = rows.new_empty if len(self.order) == tokens * self.slots else rows.new_zeros
        spread = pairs((tokens * self.slots, rows.shape[-1]))
        spread[self.order] = rows
        spread = spread.view(tokens, self.slots, -1)
        if weights is None:
            return spread.sum(1)
        if weights.dtype == rows.dtype:
            return torch.bmm(weights.unsqueeze(1), spread).squeeze(1)
        return (spread * weights.unsqueeze(-1)).sum(1).to(rows.dtype)


def _parts(
    plan: _Plan, experts: Sequence[torch.Tensor]
) -> Iterator[tuple[int, int, int, tuple[torch.Tensor, ...], torch.Tensor]]:
    """(expert, first row, end, its weights of the first product, of the second) with any row."""
    count = _count(experts)
    for expert, start, end in plan.groups:
        if len(experts) == 2:
            yield expert, start, end, (experts[0][expert],), experts[1][expert]
        else:
            first = experts[expert], experts[count + expert]
            yield expert, start, end, first, experts[2 * count + expert]


def _forward(
    plan: _Plan,
    hidden: torch.Tensor,
    weights: torch.Tensor,
    experts: Sequence[torch.Tensor],
    activation: str,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The output, and gate and up of every row (rows, 2I) where the backward needs them."""
    rows, width = len(plan.order), experts[-1].shape[-1]
    x = hidden[plan.token]
    gate_up = hidden.new_empty((rows, 2 * width))
    for _, start, end, first, _ in _parts(plan, experts):
        _products(x[start:end], first, gate_up[start:end])
    del x
    inner = activate(gate_up[:, :width], activation).mul_(gate_up[:, width:])
    if not keep:
        del gate_up
    out = hidden.new_empty((rows, hidden.shape[-1]))
    for _, start, end, _, second in _parts(plan, experts):
        torch.mm(inner[start:end], second.t(), out=out[start:end])
    return plan.combine(out, weights, len(hidden)), gate_up if keep else None


def _products(x: torch.Tensor, first: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
    """out = x W^T for one stacked weight, or side by side for gate and up apart."""
    for weight, part in zip(first, out.chunk(len(first), dim=-1), strict=True):
        torch.mm(x, weight.t(), out=part)


class _MoE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        index: torch.Tensor,
        weights: torch.Tensor,
        activation: str,
        *experts: torch.Tensor,
    ) -> torch.Tensor:
        plan = _Plan(index, _count(experts))
        out, gate_up = _forward(plan, hidden, weights, experts, activation, keep=True)
        ctx.save_for_backward(hidden, index, weights, gate_up, *experts)
        ctx.plan, ctx.activation = plan, activation
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        hidden, index, weights, gate_up, *experts = ctx.saved_tensors
        plan, activation = ctx.plan, ctx.activation
        if torch.is_grad_enabled():
            return _again(grad, hidden, index, weights, activation, experts)
        needs_hidden, _, needs_weights, _, *needs_experts = ctx.needs_input_grad
        width = experts[-1].shape[-1]
        gate, up = gate_up[:, :width], gate_up[:, width:]
        activated = activate(gate, activation)
        inner = activated * up
        grad_rows = grad[plan.token]
        row_weights = weights.reshape(-1)[plan.order].unsqueeze(-1).to(grad.dtype)
        grads: list[torch.Tensor | None] = _empty_gradients(experts, needs_experts)
        # The gradient of inner before the routing weight, which gives the weight's own.
        back = torch.empty_like(inner)
        weighted = inner * row_weights
        for expert, start, end, _, second in _parts(plan, experts):
            torch.mm(grad_rows[start:end], second, out=back[start:end])
            _store(grads, experts, expert, 1, [(grad_rows[start:end], weighted[start:end])])
        grad_weights = None
        if needs_weights:
            dot = (back * inner).sum(-1, dtype=torch.float32)
            flat = dot.new_zeros(weights.numel())
            flat[plan.order] = dot
            grad_weights = flat.view_as(weights).to(weights.dtype)
        del grad_rows, weighted
        grad_hidden = None
        if needs_hidden or any(needs_experts):
            back.mul_(row_weights)
            turned = torch.empty_like(gate_up)
            torch.mul(back, activated, out=turned[:, width:])
            turned[:, :width] = activate_backward(back.mul_(up), gate, activation)
            del back, activated, inner
            x = hidden[plan.token]
            grad_x = torch.empty_like(x) if needs_hidden else None
            for expert, start, end, first, _ in _parts(plan, experts):
                halves = turned[start:end].chunk(len(first), dim=-1)
                pairs = [(half, x[start:end]) for half in halves]
                _store(grads, experts, expert, 0, pairs)
                if grad_x is not None:
                    torch.mm(halves[0], first[0], out=grad_x[start:end])
                    for half, weight in zip(halves[1:], first[1:], strict=True):
                        grad_x[start:end].addmm_(half, weight)
            if grad_x is not None:
                grad_hidden = plan.combine(grad_x, None, len(hidden))
        return grad_hidden, None, grad_weights, None, *grads


def _empty_gradients(
    experts: Sequence[torch.Tensor], needed: Sequence[bool]
) -> list[torch.Tensor | None]:
    """Zeros for stacked weights; nothing yet for a list, where unused experts get none."""
    if len(experts) > 2:
        return [None] * len(experts)
    pairs = zip(experts, needed, strict=True)
    return [torch.zeros_like(tensor) if need else None for tensor, need in pairs]


def _store(
    grads: list[torch.Tensor | None],
    experts: Sequence[torch.Tensor],
    expert: int,
    product: int,
    pairs: list[tuple[torch.Tensor, torch.Tensor]],
) -> None:
    """Write left^T right as the gradient of one expert's weight or weights of a product."""
    if len(experts) == 2:
        if (grad := grads[product]) is not None:
            ((left, right),) = pairs
            torch.mm(left.t(), right, out=grad[expert])
        return
    count = len(experts) // 3
    for place, (left, right) in enumerate(pairs, start=2 * product):
        if experts[place * count + expert].requires_grad:
            grads[place * count + expert] = left.t() @ right


def _again(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    activation: str,
    experts: Sequence[torch.Tensor],
) -> tuple[torch.Tensor | None, ...]:
    """Gradients that can be differentiated again."""

    def eager(hidden: torch.Tensor, weights: torch.Tensor, *flat: torch.Tensor) -> torch.Tensor:
        count = _count(flat)
        if len(flat) == 2:
            return reference.moe(hidden, index, weights, *flat, activation)
        pairs = list(zip(flat[:count], flat[count : 2 * count], strict=True))
        return reference.moe(hidden, index, weights, pairs, flat[2 * count :], activation)

    found = eager_gradients(eager, (hidden, weights, *experts), (grad,))
    return found[0], None, found[1], None, *found[2:]
