"""moe through torch_npu: token permute, grouped matmul, swiglu, token unpermute."""

# npu_moe_token_permute over ..._with_routing_map, which wants a mask (T, E) of as many experts a
# token, and over npu_moe_init_routing, which has no backward.
# npu_grouped_matmul with a tensor of counts, for which nothing has to wait on the host; it has no
# backward, so that is here. It takes a transposed view of the weights, and of x to group columns.
# npu_swiglu wants gate and up side by side, as they come from stacked weights.

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch_npu
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from hf_kernel_patch.ops._shared.launch import cdiv
from hf_kernel_patch.ops.moe.experts import Experts
from hf_kernel_patch.ops.moe.grouped import Weights
from hf_kernel_patch.ops.moe.reference import Down, GateUp, plain_gradients

if TYPE_CHECKING:
    from torch.autograd.function import FunctionCtx

#: Tensors that npu_grouped_matmul takes in one list.
LISTED = 128


def moe(
    hidden: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    gate_up: GateUp,
    down: Down,
    activation: str = "silu",
) -> torch.Tensor:
    """As :func:`hf_kernel_patch.ops.moe.reference.moe`, for silu.

    Products are in the experts' dtype, sums over a token's experts in hidden's. In a list of
    experts, one that no token chose gets no gradient. Autocast is for lists alone, as in the
    originals: transformers 5 gives stacked experts to an operator that autocast does not know.
    """
    if torch.is_autocast_enabled("npu"):
        if not isinstance(down, torch.Tensor):
            dtype = torch.get_autocast_dtype("npu")
            gate_up, down = tree_map(lambda weight: weight.to(dtype), (gate_up, down))
        with torch.autocast("npu", enabled=False):
            return moe(hidden, index, weights, gate_up, down, activation)
    experts = Experts.of(gate_up, down)
    routing, weights = _route(index, weights, experts.count, experts.listed)
    if torch.is_grad_enabled() and any(
        tensor.requires_grad for tensor in (hidden, weights, *experts.flat)
    ):
        return _MoE.apply(hidden, weights, routing, *experts.flat)
    return _forward(hidden, weights, routing, experts)[0]


class _Routing(NamedTuple):
    """Where every pair of a token and its expert goes.

    Attributes:
        index: (T, K) experts.
        counts: rows of every expert, int64 on the device, for stacked weights; in a list of
            experts, of those that have a row.
        rows: how many pairs have an expert here; they come first in the order of experts.
        sizes: counts on the host, and
        hit: the experts that they are of; both for a list of experts alone.
    """

    index: torch.Tensor
    counts: torch.Tensor
    rows: int
    sizes: list[int]
    hit: list[int]


def _route(
    index: torch.Tensor, weights: torch.Tensor, experts: int, listed: bool
) -> tuple[_Routing, torch.Tensor]:
    """The routing, and the weights, which are 0 for pairs of other ranks that it had to keep."""
    # The counts come to the host, which waits for the device, where experts are a list, and where
    # other ranks may hold most of the experts: their pairs would be computed in vain otherwise.
    if listed or (torch.distributed.is_available() and torch.distributed.is_initialized()):
        counts = _counts(index, experts)
        sizes = counts.tolist()
        if rows := sum(sizes):
            return _routing(index, counts, rows, sizes, listed), weights
    # The grouped product wants an expert for every row: the last one, for nothing.
    weights = weights.masked_fill(index == experts, 0)
    index = index.clamp(max=experts - 1)
    counts = _counts(index, experts)
    sizes = counts.tolist() if listed else []
    return _routing(index, counts, index.numel(), sizes, listed), weights


def _counts(index: torch.Tensor, experts: int) -> torch.Tensor:
    """(E,) int64 pairs of every expert; bincount would wait for the device."""
    return torch.histc(index, bins=experts + 1, min=0, max=experts)[:experts].long()


def _routing(
    index: torch.Tensor, counts: torch.Tensor, rows: int, sizes: list[int], listed: bool
) -> _Routing:
    if not listed:
        return _Routing(index, counts, rows, [], [])
    hit = [expert for expert, size in enumerate(sizes) if size]
    if len(hit) < len(sizes):
        sizes = [sizes[expert] for expert in hit]
        counts = torch.tensor(sizes, device=counts.device)
    return _Routing(index, counts, rows, sizes, hit)


def _grouped_product(
    routing: _Routing, rows: torch.Tensor, weights: Weights, transpose: bool
) -> torch.Tensor:
    """Every row times its expert's weight (N, K), transposed, as a view, if ``transpose``."""
    if isinstance(weights, torch.Tensor):
        if len(weights) == 1:  # a group_list of one is refused
            return rows @ (weights[0].t() if transpose else weights[0])
        weight = weights.transpose(1, 2) if transpose else weights
        return _grouped_matmul(rows, [weight], routing.counts)
    chosen = [weights[expert].t() if transpose else weights[expert] for expert in routing.hit]
    if len(chosen) == 1 or rows.dtype is torch.float32:  # float32 is for single tensors alone
        by_expert = zip(rows.split(routing.sizes), chosen, strict=True)
        return torch.cat([part @ weight for part, weight in by_expert])
    # As few calls as it takes, of about as many experts each: never of one, which is refused.
    size = cdiv(len(chosen), cdiv(len(chosen), LISTED))
    starts = range(0, len(chosen), size)
    parts = rows.split([sum(routing.sizes[start : start + size]) for start in starts])
    outs = [
        _grouped_matmul(part, chosen[start : start + size], routing.counts[start : start + size])
        for part, start in zip(parts, starts, strict=True)
    ]
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def _grouped_matmul(
    rows: torch.Tensor, weights: list[torch.Tensor], counts: torch.Tensor
) -> torch.Tensor:
    """Rows grouped along their first dimension times the weights (K, N) of their groups."""
    options = {"group_list": counts, "group_list_type": 1, "group_type": 0, "split_item": 2}
    return torch_npu.npu_grouped_matmul([rows], weights, **options)[0]


def _weight_gradients(
    routing: _Routing, left: torch.Tensor, right: Callable[[], torch.Tensor], weights: Weights
) -> list[torch.Tensor | None]:
    """left^T right over every expert's rows: one stacked tensor, or one for each that is used.

    ``right`` makes its tensor where the weights need a gradient.
    """
    stacked = isinstance(weights, torch.Tensor)
    tensors = [weights] if isinstance(weights, torch.Tensor) else weights
    found: list[torch.Tensor | None] = [None] * len(tensors)
    if not any(weight.requires_grad for weight in tensors):
        return found
    if len(routing.counts) == 1:
        grads = (left.t() @ right()).unsqueeze(0)
    else:
        options = {"group_list_type": 1, "group_type": 2, "split_item": 3}
        grads = torch_npu.npu_grouped_matmul(
            [left.t()], [right()], group_list=routing.counts, **options
        )[0]
    if stacked:
        return [grads]
    for expert, grad in zip(routing.hit, grads, strict=True):
        found[expert] = grad
    return found


def _permute(hidden: torch.Tensor, routing: _Routing) -> tuple[torch.Tensor, torch.Tensor]:
    """The (rows, H) tokens in the order of experts, and where every pair went, int32 (T * K)."""
    permuted, positions = torch_npu.npu_moe_token_permute(hidden, routing.index, routing.rows)
    return permuted, positions


def _padded(rows: torch.Tensor, routing: _Routing) -> torch.Tensor:
    """Rows of zeros for the pairs of other ranks: the operators want all T * K."""
    missing = routing.index.numel() - routing.rows
    return F.pad(rows, (0, 0, 0, missing)) if missing else rows


def _forward(
    hidden: torch.Tensor,
    weights: torch.Tensor,
    routing: _Routing,
    experts: Experts,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The output, and what the backward needs: positions, gate and up joined, and the rows."""
    *first, second = experts.products
    permuted, positions = _permute(hidden.to(experts.flat[0].dtype), routing)
    parts = [_grouped_product(routing, permuted, weight, transpose=True) for weight in first]
    joined = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    rows = _grouped_product(routing, torch_npu.npu_swiglu(joined), second, transpose=True)
    rows = _padded(rows, routing)
    out = torch_npu.npu_moe_token_unpermute(rows.to(hidden.dtype), positions, weights)
    return out, [positions, joined, rows]


class _MoE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: torch.Tensor,
        weights: torch.Tensor,
        routing: _Routing,
        *flat: torch.Tensor,
    ) -> torch.Tensor:
        out, kept = _forward(hidden, weights, routing, Experts(flat))
        ctx.save_for_backward(hidden, weights, *kept, *routing[:2], *flat)
        ctx.sizes = routing[2:]
        return out

    @staticmethod
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weights, positions, joined, rows, index, counts, *flat = ctx.saved_tensors
        experts = Experts(flat)
        routing = _Routing(index, counts, *ctx.sizes)
        if torch.is_grad_enabled():
            again = plain_gradients(grad, hidden, routing.index, weights, "silu", experts)
            return again[0], again[1], None, *again[2:]
        needs_hidden, _, _, *needs_experts = ctx.needs_input_grad
        *first, second = experts.products
        grad_rows, grad_weights = torch_npu.npu_moe_token_unpermute_grad(
            rows.to(grad.dtype), grad, positions, weights
        )
        grad_rows = grad_rows[: routing.rows].to(rows.dtype)
        last_grads = _weight_gradients(
            routing, grad_rows, lambda: torch_npu.npu_swiglu(joined), second
        )
        if not (needs_hidden or any(needs_experts[: -len(last_grads)])):
            nothing = [None] * (len(flat) - len(last_grads))
            return None, grad_weights, None, *nothing, *last_grads
        back = _grouped_product(routing, grad_rows, second, transpose=False)
        back = torch_npu.npu_swiglu_backward(back, joined)
        grads = [back] if len(first) == 1 else [half.contiguous() for half in back.chunk(2, -1)]
        permuted = cache(lambda: _permute(hidden.to(rows.dtype), routing)[0])
        first_grads = [
            weight_grad
            for grad, weight in zip(grads, first, strict=True)
            for weight_grad in _weight_gradients(routing, grad, permuted, weight)
        ]
        grad_hidden = None
        if needs_hidden:
            sums = [
                _grouped_product(routing, grad, weight, transpose=False)
                for grad, weight in zip(grads, first, strict=True)
            ]
            total = sums[0] if len(sums) == 1 else sums[0].add_(sums[1])
            grad_hidden = torch_npu.npu_moe_token_permute_grad(
                hidden, _padded(total, routing).to(hidden.dtype), routing.index, positions
            )
        return grad_hidden, grad_weights, None, *first_grads, *last_grads
