"""Forward and backward of the experts in Triton: what is launched, over which tiles."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from hf_kernel_patch.ops.launch import processors
from hf_kernel_patch.ops.moe.experts import Experts
from hf_kernel_patch.ops.moe.triton import gradients, products, rowwise
from hf_kernel_patch.ops.moe.triton.launch import (
    Stack,
    dtypes_of,
    launch_over,
    launcher_for,
    precision_of,
    stacks,
)
from hf_kernel_patch.ops.moe.triton.routing import Plan, plan
from hf_kernel_patch.ops.moe.triton.tiles import Tile, Tiles, choose
from hf_kernel_patch.ops.swiglu.triton import CODES

#: Up to so many pairs for an expert, every pair reads its expert's weights by itself.
FEW = 1
#: Columns, step and warps of the two products for few pairs.
PAIR_INNER, PAIR_DOWN = (8, 1024, 4), (2, 128, 4)
#: Columns that a program of the sum over a token's rows takes, and its warps.
COMBINE = (1024, 4)
#: Rows and columns of the activation on its own.
ACTIVATION = (16, 128, 4)


class Sizes(NamedTuple):
    tokens: int
    top: int
    experts: int
    hidden: int
    width: int

    @property
    def pairs(self) -> int:
        return self.tokens * self.top


def sizes_of(index: torch.Tensor, down: Stack) -> Sizes:
    tokens, top = index.shape
    return Sizes(tokens, top, down.experts, down.n, down.k)


def forward(
    hidden: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    experts: Experts,
    activation: str,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, Plan | None]:
    """The output; gate and up of every row (P, 2 I) and the plan, where the backward needs them."""
    gate_up, down = stacks(experts)
    sizes, code = sizes_of(index, down), CODES[activation]
    out = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    if not sizes.pairs:
        return out, hidden.new_empty(0, 2 * sizes.width) if keep else None, None
    hidden, index, weights = hidden.contiguous(), index.contiguous(), weights.contiguous()
    inner = hidden.new_empty(sizes.pairs, sizes.width)
    if sizes.pairs <= FEW * sizes.experts and not keep and not gate_up.unit:
        _few(hidden, index, weights, gate_up, down, inner, out, sizes, code)
        return out, None, None
    tiles = choose(hidden.device, hidden.dtype, sizes.pairs, sizes.experts)
    order = plan(index, sizes.experts, tiles.gate_up.m)
    kept = hidden.new_empty(sizes.pairs, 2 * sizes.width) if keep else None
    launch_over(
        products.gate_up_kernel,
        order,
        sizes.width,
        tiles.gate_up,
        (hidden, gate_up, inner if kept is None else kept, inner, order.pairs),
        (sizes.width, sizes.hidden, sizes.top, code, keep),
    )
    rows = hidden.new_empty(sizes.pairs, sizes.hidden)
    _rows_times(inner, down, rows, order, tiles.down, turn=True)
    _combine(rows, order, weights, out, sizes)
    return out, kept, order


def _few(
    hidden: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    gate_up: Stack,
    down: Stack,
    inner: torch.Tensor,
    out: torch.Tensor,
    sizes: Sizes,
    code: int,
) -> None:
    """Two launches without rows sorted: a program for a pair, or a token, and some columns."""
    width, size = sizes.width, sizes.hidden
    common = (width, size, sizes.experts, sizes.top)
    n, k, warps = PAIR_INNER
    static: tuple[Any, ...] = (*common, code, n, min(k, _power(size)))
    launch = launcher_for(rowwise.pair_inner_kernel, dtypes_of(hidden, index), static, warps)
    blocks = sizes.pairs * -(-width // n)
    launch(blocks, (hidden, index, gate_up.weight, inner), (sizes.pairs,))
    n, k, warps = PAIR_DOWN
    static = (*common, _power(sizes.top), n, min(k, _power(width)))
    launch = launcher_for(rowwise.pair_down_kernel, dtypes_of(inner, index, weights), static, warps)
    blocks = sizes.tokens * -(-size // n)
    launch(blocks, (inner, index, weights, down.weight, out), (sizes.tokens,))


def backward(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    experts: Experts,
    kept: torch.Tensor,
    order: Plan | None,
    activation: str,
    needed: tuple[bool, bool, bool, bool],
) -> list[torch.Tensor | None]:
    """Gradients of hidden, weights, gate_up (E, 2 I, H) and down (E, H, I), None if not needed.

    Without tokens there is no order; elsewhere it is made again where it was not kept.
    """
    gate_up, down = stacks(experts)
    sizes = sizes_of(index, down)
    with_hidden, with_weights, with_gate_up, with_down = needed
    if not sizes.pairs:
        made = (torch.zeros_like(hidden), torch.zeros_like(weights), *_zeros(gate_up, down))
        return [one if wanted else None for one, wanted in zip(made, needed)]
    grad, hidden = grad.contiguous(), hidden.contiguous()
    index, weights = index.contiguous(), weights.contiguous()
    tiles = choose(hidden.device, hidden.dtype, sizes.pairs, sizes.experts)
    order = order or plan(index, sizes.experts, tiles.gate_up.m)
    with_kept = with_hidden or with_gate_up
    grad_kept, scaled, grad_weights = _inner_backward(
        grad, weights, down, kept, order, tiles, sizes, CODES[activation],
        (with_kept, with_down, with_weights),
    )  # fmt: skip
    grad_down = grad_gate_up = grad_hidden = None
    shapes = (
        (sizes.experts, sizes.hidden, sizes.width),
        (sizes.experts, 2 * sizes.width, sizes.hidden),
    )
    if scaled is not None:
        grad_down = _weight_gradient(
            grad, scaled, order, shapes[0], (sizes.top, 0), tiles.down_weight
        )
        del scaled
    if grad_kept is not None and with_hidden:
        rows = hidden.new_empty(sizes.pairs, sizes.hidden)
        _rows_times(grad_kept, gate_up, rows, order, tiles.hidden_backward, turn=False)
        grad_hidden = torch.empty_like(hidden)
        _combine(rows, order, None, grad_hidden, sizes)
        del rows
    if grad_kept is not None and with_gate_up:
        grad_gate_up = _weight_gradient(
            grad_kept, hidden, order, shapes[1], (0, sizes.top), tiles.gate_up_weight
        )
    return [grad_hidden, grad_weights, grad_gate_up, grad_down]


def _zeros(gate_up: Stack, down: Stack) -> tuple[torch.Tensor, torch.Tensor]:
    first = gate_up.weight.new_zeros(gate_up.experts, 2 * gate_up.n, gate_up.k)
    return first, down.weight.new_zeros(down.experts, down.n, down.k)


def _inner_backward(
    grad: torch.Tensor,
    weights: torch.Tensor,
    down: Stack,
    kept: torch.Tensor,
    order: Plan,
    tiles: Tiles,
    sizes: Sizes,
    code: int,
    wanted: tuple[bool, bool, bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """The gradients of gate and up, inner times the routing weight, the gradient of the weights."""
    with_kept, with_scaled, with_dots = wanted
    tile = tiles.inner_backward
    grad_kept = torch.empty_like(kept) if with_kept else None
    scaled = kept.new_empty(sizes.pairs, sizes.width) if with_scaled else None
    dots = None
    if with_dots:
        columns = -(-sizes.width // tile.n)
        # Zeros, as pairs of no expert here are not written.
        dots = torch.zeros(sizes.pairs, columns, dtype=torch.float32, device=kept.device)
    places = [kept if one is None else one for one in (grad_kept, scaled, dots)]
    if with_kept or with_dots:
        launch_over(
            gradients.inner_backward_kernel,
            order,
            sizes.width,
            tile,
            (grad, down, kept, weights, *places, order.pairs),
            (sizes.width, sizes.hidden, sizes.top, code, *wanted),
            (tiles.part,),
        )
    elif with_scaled:
        m, n, warps = ACTIVATION
        static = (sizes.width, sizes.experts, code, m, n)
        launch = launcher_for(rowwise.scaled_kernel, dtypes_of(kept, weights), static, warps)
        blocks = -(-sizes.pairs // m) * -(-sizes.width // n)
        launch(blocks, (kept, weights, places[1], order.pairs, order.ends), ())
    grad_weights = None
    if dots is not None:
        grad_weights = dots.sum(1).view_as(weights).to(weights.dtype)
    return grad_kept, scaled, grad_weights


def _rows_times(
    x: torch.Tensor, stack: Stack, out: torch.Tensor, order: Plan, tile: Tile, turn: bool
) -> None:
    """Every row of x times its expert's weight, transposed if ``turn``."""
    parts = 2 if stack.parts == 2 and stack.unit else 1
    n, k = (stack.n, stack.k) if turn else (stack.k, stack.n * stack.parts // parts)
    loops = processors(x.device) if tile.loops else 0
    launch_over(products.rows_kernel, order, n, tile, (x, stack, out), (n, k, parts, turn, loops))


def _weight_gradient(
    left: torch.Tensor,
    right: torch.Tensor,
    order: Plan,
    shape: tuple[int, int, int],
    tops: tuple[int, int],
    tile: Tile,
) -> torch.Tensor:
    """left^T right (E, M, N) over every expert's rows, gathered from tokens where tops say so."""
    experts, m, n = shape
    out = left.new_empty(shape)
    static = (m, n, *tops, precision_of(left.dtype), tile.m, tile.n, tile.k)
    launch = launcher_for(gradients.weight_kernel, dtypes_of(left), static, tile.warps, tile.stages)
    programs = experts * -(-m // tile.m) * -(-n // tile.n)
    launch(programs, (left, right, out, order.pairs, order.ends), ())
    return out


def _combine(
    rows: torch.Tensor,
    order: Plan,
    weights: torch.Tensor | None,
    out: torch.Tensor,
    sizes: Sizes,
) -> None:
    """The sum of every token's rows, weighted where there are weights."""
    block, warps = COMBINE
    block = min(block, _power(sizes.hidden))
    given = rows if weights is None else weights
    static = (sizes.hidden, sizes.top, weights is not None, block)
    launch = launcher_for(rowwise.combine_kernel, dtypes_of(rows, given), static, warps)
    launch(sizes.tokens * -(-sizes.hidden // block), (rows, order.rows, given, out), ())


def _power(size: int) -> int:
    """The power of two that holds a row."""
    return 1 << (size - 1).bit_length()
