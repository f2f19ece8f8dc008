"""The backward's products in Triton: SwiGLU's own in an epilogue, and the weights' gradients.

Names and weights are as in ``products``. With w for a row's routing weight:

1. ``inner_backward_kernel``: the gradient of inner = activation(gate) * up is w times the token's
   gradient times down. Its epilogue makes all that needs gate and up, which are read once: their
   gradients; w * inner, for the gradient of down; and the gradient of w, which is inner times
   the product before w.
2. ``weight_kernel``: the gradient of down from the tokens' gradients and w * inner.
3. ``products.rows_kernel`` and ``rowwise.combine_kernel``: the gradient of hidden.
4. ``weight_kernel``: the gradients of gate and up from their rows' and hidden.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from hf_kernel_patch.ops.moe.triton.products import (
    dot_added,
    halves,
    product,
    tile_of,
    weight_offset,
)
from hf_kernel_patch.ops.swiglu.triton import value_and_slope


@triton.jit
def activation_backward(
    b_grad,  # (BLOCK_M, SPAN) float32, the gradient of inner before the routing weight
    kept,
    grad_kept,
    scaled,
    routing_weight,  # (BLOCK_M,) float32
    o_row,
    m_row,
    column,  # the first one
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    WITH_KEPT: tl.constexpr,
    WITH_SCALED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SPAN: tl.constexpr,
):
    """SwiGLU's backward of SPAN columns of a tile; the dot of the gradient and inner."""
    o_n = column + tl.arange(0, SPAN)
    mask = m_row[:, None] & (o_n < WIDTH)[None, :]
    o_line = o_row.to(tl.int64)[:, None]
    dtype = kept.dtype.element_ty
    gate = tl.load(kept + o_line * (2 * WIDTH) + o_n[None, :], mask, 0.0).to(tl.float32)
    up = tl.load(kept + o_line * (2 * WIDTH) + WIDTH + o_n[None, :], mask, 0.0).to(tl.float32)
    activated, slope = value_and_slope(gate, ACTIVATION)
    # Inner as the forward rounded it; the gradients beside it are rounded when they are stored.
    inner = (activated.to(dtype).to(tl.float32) * up).to(dtype).to(tl.float32)
    dot = tl.sum(b_grad * inner, 1)
    if WITH_SCALED:
        p_scaled = scaled + o_line * WIDTH + o_n[None, :]
        tl.store(p_scaled, (inner * routing_weight[:, None]).to(dtype), mask)
    if WITH_KEPT:
        b_grad *= routing_weight[:, None]
        o_line *= 2 * WIDTH
        tl.store(grad_kept + o_line + o_n[None, :], (b_grad * up * slope).to(dtype), mask)
        tl.store(grad_kept + o_line + WIDTH + o_n[None, :], (b_grad * activated).to(dtype), mask)
    return dot


@triton.jit
def _in_two(
    b_grad,
    kept,
    grad_kept,
    scaled,
    routing_weight,
    o_row,
    m_row,
    column,
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    WITH_KEPT: tl.constexpr,
    WITH_SCALED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SPAN: tl.constexpr,
):
    """``activation_backward``, one half of the columns after the other."""
    left, right = halves(b_grad, BLOCK_M, SPAN // 2)
    dot = activation_backward(
        left, kept, grad_kept, scaled, routing_weight, o_row, m_row, column,
        WIDTH, ACTIVATION, WITH_KEPT, WITH_SCALED, BLOCK_M, SPAN // 2,
    )  # fmt: skip
    return dot + activation_backward(
        right, kept, grad_kept, scaled, routing_weight, o_row, m_row, column + SPAN // 2,
        WIDTH, ACTIVATION, WITH_KEPT, WITH_SCALED, BLOCK_M, SPAN // 2,
    )  # fmt: skip


@triton.jit
def _activation_backward_in_parts(
    b_grad,
    kept,
    grad_kept,
    scaled,
    routing_weight,
    o_row,
    m_row,
    column,
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    WITH_KEPT: tl.constexpr,
    WITH_SCALED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SPAN: tl.constexpr,
    PART: tl.constexpr,
):
    """``activation_backward``, in as many parts of at most PART columns as it takes, up to four.

    All at once, gate, up and what comes of them would not fit into registers beside the tile.
    """
    if SPAN <= PART:
        return activation_backward(
            b_grad, kept, grad_kept, scaled, routing_weight, o_row, m_row, column,
            WIDTH, ACTIVATION, WITH_KEPT, WITH_SCALED, BLOCK_M, SPAN,
        )  # fmt: skip
    elif SPAN <= 2 * PART:
        return _in_two(
            b_grad, kept, grad_kept, scaled, routing_weight, o_row, m_row, column,
            WIDTH, ACTIVATION, WITH_KEPT, WITH_SCALED, BLOCK_M, SPAN,
        )  # fmt: skip
    else:
        left, right = halves(b_grad, BLOCK_M, SPAN // 2)
        dot = _in_two(
            left, kept, grad_kept, scaled, routing_weight, o_row, m_row, column,
            WIDTH, ACTIVATION, WITH_KEPT, WITH_SCALED, BLOCK_M, SPAN // 2,
        )  # fmt: skip
        return dot + _in_two(
            right, kept, grad_kept, scaled, routing_weight, o_row, m_row, column + SPAN // 2,
            WIDTH, ACTIVATION, WITH_KEPT, WITH_SCALED, BLOCK_M, SPAN // 2,
        )  # fmt: skip


@triton.jit(do_not_specialize=["max_tiles"])
def inner_backward_kernel(
    grad,  # (T, H)
    weight,  # (E, H, I) of the second product
    offsets,  # (E, 1) int64
    kept,  # (P, 2 I) gate and up
    weights,  # (P,) routing weights
    grad_kept,  # (P, 2 I)
    scaled,  # (P, I) activation(gate) * up * routing weight
    dots,  # (P, columns) float32 parts of the routing weights' gradients
    pairs,
    ends,
    tiles,
    max_tiles: tl.int32,
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    TOP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    WITH_KEPT: tl.constexpr,
    WITH_SCALED: tl.constexpr,
    WITH_DOTS: tl.constexpr,
    UNIT: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PART: tl.constexpr,  # columns that the epilogue takes at a time
):
    COLUMNS: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0)
    if tile >= tl.load(tiles + 2 * max_tiles) * COLUMNS:
        return
    # Few columns are taken row by row, or what is read and written of a row lies apart in time.
    ROW_GROUP: tl.constexpr = GROUP if COLUMNS > 8 else 1
    expert, _, o_row, m_row, column = tile_of(
        tile, tiles, ends, max_tiles, COLUMNS, BLOCK_M, ROW_GROUP
    )
    o_pair = tl.load(pairs + o_row, m_row, 0)
    o_weight = weight_offset(offsets, expert, 0, 1, HIDDEN * WIDTH, UNIT)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc = product(
        grad, o_pair // TOP, weight, o_weight, o_weight, expert, column, acc,
        WIDTH, HIDDEN, HIDDEN, 1, False, False, DESCRIPTOR, PRECISION, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    routing_weight = tl.load(weights + o_pair, m_row, 0.0).to(tl.float32)
    dot = _activation_backward_in_parts(
        acc, kept, grad_kept, scaled, routing_weight, o_row, m_row, column * BLOCK_N,
        WIDTH, ACTIVATION, WITH_KEPT, WITH_SCALED, BLOCK_M, BLOCK_N, PART,
    )  # fmt: skip
    if WITH_DOTS:
        # A place of its own for every block of columns: added up later, in one order at every run.
        tl.store(dots + o_pair.to(tl.int64) * COLUMNS + column, dot, m_row)


@triton.jit
def weight_kernel(
    left,  # (P, M), or (T, M) where LEFT_TOP is given
    right,  # (P, N), or (T, N) where RIGHT_TOP is given
    out,  # (E, M, N)
    pairs,
    ends,
    M: tl.constexpr,
    N: tl.constexpr,
    LEFT_TOP: tl.constexpr,  # TOP where left is gathered by token, otherwise 0
    RIGHT_TOP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """left^T right over the rows of every expert; zeros for one that has none."""
    BLOCKS_M: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    BLOCKS_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0)
    expert = tile // (BLOCKS_M * BLOCKS_N)
    o_m = tile // BLOCKS_N % BLOCKS_M * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tile % BLOCKS_N * BLOCK_N + tl.arange(0, BLOCK_N)
    start = tl.load(ends + expert - 1, expert > 0, 0)
    end = tl.load(ends + expert)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    o_first = start + tl.arange(0, BLOCK_K)
    o_pair = tl.load(pairs + o_first, o_first < end, 0)
    for first in range(start, end, BLOCK_K):
        o_row = first + tl.arange(0, BLOCK_K)  # not carried from step to step, which is slower
        m_row = o_row < end
        o_left = o_pair // LEFT_TOP if LEFT_TOP else o_row
        o_right = o_pair // RIGHT_TOP if RIGHT_TOP else o_row
        # Loaded a step ahead, or the loads that it points to could not be.
        o_pair = tl.load(pairs + o_row + BLOCK_K, o_row + BLOCK_K < end, 0)
        m_left, m_right = m_row[:, None], m_row[:, None]
        if M % BLOCK_M:
            m_left = m_left & (o_m < M)[None, :]
        if N % BLOCK_N:
            m_right = m_right & (o_n < N)[None, :]
        b_left = tl.load(left + o_left.to(tl.int64)[:, None] * M + o_m[None, :], m_left, 0.0)
        b_right = tl.load(right + o_right.to(tl.int64)[:, None] * N + o_n[None, :], m_right, 0.0)
        acc = dot_added(tl.trans(b_left), b_right, acc, PRECISION)
    p_out = out + expert.to(tl.int64) * (M * N) + o_m.to(tl.int64)[:, None] * N + o_n[None, :]
    tl.store(p_out, acc.to(out.dtype.element_ty), (o_m < M)[:, None] & (o_n < N)[None, :])
