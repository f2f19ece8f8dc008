"""Forward and backward of the experts in Triton: what is launched, over which tiles.

The steps are numbered in ``products`` and ``gradients``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from hf_kernel_patch.ops._shared.launch import cdiv, processors
from hf_kernel_patch.ops.moe.experts import Experts
from hf_kernel_patch.ops.moe.triton import gradients, products, rowwise
from hf_kernel_patch.ops.moe.triton.launch import (
    GroupedWeight,
    dtypes_of,
    grouped_weights,
    launch_over,
    launcher_for,
    precision_of,
)
from hf_kernel_patch.ops.moe.triton.routing import Routing, route
from hf_kernel_patch.ops.moe.triton.tiles import Tile, Tiles, choose
from hf_kernel_patch.ops.swiglu.triton import CODES

#: Up to so many pairs for an expert, every pair reads its expert's weights by itself.
FEW = 1
#: Columns, step and warps of the two products for few pairs.
PAIR_INNER, PAIR_DOWN = (8, 1024, 4), (2, 128, 4)
#: Columns that a program of the sum over a token's rows takes, and its warps.
COMBINE = (1024, 4)
#: Rows, columns and warps of the activation on its own.
ACTIVATION = (16, 128, 4)


class Sizes(NamedTuple):
    tokens: int
    top: int  # experts of a token
    experts: int
    hidden: int
    width: int

    @property
    def pairs(self) -> int:
        return self.tokens * self.top


class Needed(NamedTuple):
    """Which gradients are needed."""

    hidden: bool
    weights: bool
    gate_up: bool
    down: bool


def sizes_of(index: torch.Tensor, down: GroupedWeight) -> Sizes:
    tokens, top = index.shape
    return Sizes(tokens, top, down.experts, down.n, down.k)


def forward(
    hidden: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    experts: Experts,
    activation: str,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, Routing | None]:
    """The output; gate and up of every row (P, 2 I), where the backward needs them; the routing."""
    gate_up, down = grouped_weights(experts)
    sizes, code = sizes_of(index, down), CODES[activation]
    out = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    if not sizes.pairs:
        return out, hidden.new_empty(0, 2 * sizes.width) if keep else None, None
    hidden, index, weights = hidden.contiguous(), index.contiguous(), weights.contiguous()
    inner = hidden.new_empty(sizes.pairs, sizes.width)
    if sizes.pairs <= FEW * sizes.experts and not keep and not gate_up.unit:
        _forward_unsorted(hidden, index, weights, gate_up, down, inner, out, sizes, code)
        return out, None, None
    tiles = choose(hidden.device, hidden.dtype, sizes.pairs, sizes.experts)
    routing = route(index, sizes.experts, tiles.gate_up.m)
    kept = hidden.new_empty(sizes.pairs, 2 * sizes.width) if keep else None
    launch_over(
        products.gate_up_kernel,
        routing,
        tiles.gate_up,
        hidden,
        gate_up,
        (inner if kept is None else kept, inner, routing.pairs),
        (sizes.width, sizes.hidden, sizes.top, code, keep),
        columns=sizes.width,
        transpose=True,
    )
    rows = hidden.new_empty(sizes.pairs, sizes.hidden)
    _rows_product(inner, down, rows, routing, tiles.down, transpose=True)
    _combine(rows, routing, weights, out, sizes)
    return out, kept, routing


def _forward_unsorted(
    hidden: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    gate_up: GroupedWeight,
    down: GroupedWeight,
    inner: torch.Tensor,
    out: torch.Tensor,
    sizes: Sizes,
    code: int,
) -> None:
    """Two launches: a program for a pair, then for a token, and some columns."""
    width, size = sizes.width, sizes.hidden
    common = (width, size, sizes.experts, sizes.top)
    n, k, warps = PAIR_INNER
    inner_static = (*common, code, n, min(k, _power_of_2(size)))
    dtypes = dtypes_of(hidden, index)
    launch = launcher_for(rowwise.pair_inner_kernel, dtypes, inner_static, warps, waits=True)
    programs = sizes.pairs * cdiv(width, n)
    launch(programs, (hidden, index, gate_up.weight, inner), (sizes.pairs,))
    n, k, warps = PAIR_DOWN
    down_static = (*common, _power_of_2(sizes.top), n, min(k, _power_of_2(width)))
    dtypes = dtypes_of(inner, index, weights)
    launch = launcher_for(rowwise.pair_down_kernel, dtypes, down_static, warps, waits=True)
    programs = sizes.tokens * cdiv(size, n)
    launch(programs, (inner, index, weights, down.weight, out), (sizes.tokens,))


def backward(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    experts: Experts,
    kept: torch.Tensor,
    routing: Routing | None,
    activation: str,
    needed: Needed,
) -> list[torch.Tensor | None]:
    """Gradients of hidden, weights, gate_up (E, 2 I, H) and down (E, H, I), None if not needed.

    Without tokens there is no routing; elsewhere it is made again where it was not kept.
    """
    gate_up, down = grouped_weights(experts)
    sizes = sizes_of(index, down)
    gate_up_shape = sizes.experts, 2 * sizes.width, sizes.hidden
    down_shape = sizes.experts, sizes.hidden, sizes.width
    if not sizes.pairs:
        return [
            torch.zeros_like(hidden) if needed.hidden else None,
            torch.zeros_like(weights) if needed.weights else None,
            gate_up.weight.new_zeros(gate_up_shape) if needed.gate_up else None,
            down.weight.new_zeros(down_shape) if needed.down else None,
        ]
    grad, hidden = grad.contiguous(), hidden.contiguous()
    index, weights = index.contiguous(), weights.contiguous()
    tiles = choose(hidden.device, hidden.dtype, sizes.pairs, sizes.experts)
    routing = routing or route(index, sizes.experts, tiles.gate_up.m)
    grad_kept, scaled, grad_weights = _inner_backward(
        grad, weights, down, kept, routing, tiles, sizes, CODES[activation], needed
    )
    grad_down = grad_gate_up = grad_hidden = None
    # In this order, and each dropped at its last use, as rows are most of the memory.
    if scaled is not None:
        grad_down = _weight_gradient(
            grad, scaled, routing, down_shape, tiles.down_weight, left_top=sizes.top
        )
        del scaled
    if grad_kept is not None and needed.hidden:
        rows = hidden.new_empty(sizes.pairs, sizes.hidden)
        _rows_product(grad_kept, gate_up, rows, routing, tiles.hidden_backward, transpose=False)
        grad_hidden = torch.empty_like(hidden)
        _combine(rows, routing, None, grad_hidden, sizes)
        del rows
    if grad_kept is not None and needed.gate_up:
        grad_gate_up = _weight_gradient(
            grad_kept, hidden, routing, gate_up_shape, tiles.gate_up_weight, right_top=sizes.top
        )
    return [grad_hidden, grad_weights, grad_gate_up, grad_down]


def _inner_backward(
    grad: torch.Tensor,
    weights: torch.Tensor,
    down: GroupedWeight,
    kept: torch.Tensor,
    routing: Routing,
    tiles: Tiles,
    sizes: Sizes,
    code: int,
    needed: Needed,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """The gradients of gate and up, inner times the routing weight, the gradient of the weights."""
    tile = tiles.inner_backward
    grad_kept = scaled = dots = None
    if needed.hidden or needed.gate_up:
        grad_kept = torch.empty_like(kept)
    if needed.down:
        scaled = kept.new_empty(sizes.pairs, sizes.width)
    if needed.weights:
        columns = cdiv(sizes.width, tile.n)
        # Zeros, as pairs of no expert here are not written.
        dots = torch.zeros(sizes.pairs, columns, dtype=torch.float32, device=kept.device)
    if grad_kept is not None or dots is not None:
        # What is not wanted is not written: any pointer will do.
        outputs = (grad_kept, scaled, dots)
        pointers = [kept if output is None else output for output in outputs]
        wanted = [output is not None for output in outputs]
        launch_over(
            gradients.inner_backward_kernel,
            routing,
            tile,
            grad,
            down,
            (kept, weights, *pointers, routing.pairs),
            (sizes.width, sizes.hidden, sizes.top, code, *wanted),
            (tiles.part,),
            columns=sizes.width,
            transpose=False,
        )
    elif scaled is not None:
        m, n, warps = ACTIVATION
        static = (sizes.width, sizes.experts, code, m, n)
        launch = launcher_for(rowwise.scaled_kernel, dtypes_of(kept, weights), static, warps)
        programs = cdiv(sizes.pairs, m) * cdiv(sizes.width, n)
        launch(programs, (kept, weights, scaled, routing.pairs, routing.ends), ())
    grad_weights = None
    if dots is not None:
        grad_weights = dots.sum(1).view_as(weights).to(weights.dtype)
    return grad_kept, scaled, grad_weights


def _rows_product(
    x: torch.Tensor,
    weight: GroupedWeight,
    out: torch.Tensor,
    routing: Routing,
    tile: Tile,
    transpose: bool,
) -> None:
    """Every row of x times its expert's weight, transposed if ``transpose``."""
    # Stacked, gate and up are one weight; listed, their products are added up.
    parts = weight.parts if weight.unit else 1
    n, k = (weight.n, weight.k) if transpose else (weight.k, weight.n * weight.parts // parts)
    programs = processors(x.device) if tile.loops else 0
    launch_over(
        products.rows_kernel,
        routing,
        tile,
        x,
        weight,
        (out,),
        (n, k, parts, transpose, programs),
        columns=n,
        transpose=transpose,
        x_is_sorted=True,
    )


def _weight_gradient(
    left: torch.Tensor,
    right: torch.Tensor,
    routing: Routing,
    shape: tuple[int, int, int],
    tile: Tile,
    *,
    left_top: int = 0,
    right_top: int = 0,
) -> torch.Tensor:
    """left^T right (E, M, N) over every expert's rows; with a top, gathered from tokens."""
    experts, m, n = shape
    out = left.new_empty(shape)
    static = (m, n, left_top, right_top, precision_of(left.dtype), tile.m, tile.n, tile.k)
    launch = launcher_for(gradients.weight_kernel, dtypes_of(left), static, tile.warps, tile.stages)
    programs = experts * cdiv(m, tile.m) * cdiv(n, tile.n)
    launch(programs, (left, right, out, routing.pairs, routing.ends), ())
    return out


def _combine(
    rows: torch.Tensor,
    routing: Routing,
    weights: torch.Tensor | None,
    out: torch.Tensor,
    sizes: Sizes,
) -> None:
    """The sum of every token's rows, weighted where there are weights."""
    block, warps = COMBINE
    block = min(block, _power_of_2(sizes.hidden))
    given = rows if weights is None else weights
    static = (sizes.hidden, sizes.top, weights is not None, block)
    launch = launcher_for(rowwise.combine_kernel, dtypes_of(rows, given), static, warps)
    programs = sizes.tokens * cdiv(sizes.hidden, block)
    launch(programs, (rows, routing.rows, given, out), ())


def _power_of_2(size: int) -> int:
    """The power of two that holds a row."""
    return 1 << (size - 1).bit_length()
