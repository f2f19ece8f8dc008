"""The backward's products in Triton: SwiGLU's own in an epilogue, and the weights' gradients.

Names and weights are as in ``triton_products``.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from hf_kernel_patch.ops.moe.triton.products import dot_added, halves, origin_of, product, tile_of
from hf_kernel_patch.ops.swiglu.triton import value_and_slope


@triton.jit
def activation_backward(
    back,
    kept,
    grad_kept,
    scaled,
    share,
    rows,
    here,
    column,
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    WITH_KEPT: tl.constexpr,
    WITH_SCALED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SPAN: tl.constexpr,
):
    """SwiGLU's backward of SPAN columns of a tile; the dot of back and its output."""
    n = column + tl.arange(0, SPAN)
    mask = here[:, None] & (n < WIDTH)[None, :]
    place = rows.to(tl.int64)[:, None]
    kind = kept.dtype.element_ty
    gate = tl.load(kept + place * (2 * WIDTH) + n[None, :], mask, 0.0).to(tl.float32)
    up = tl.load(kept + place * (2 * WIDTH) + WIDTH + n[None, :], mask, 0.0).to(tl.float32)
    activated, slope = value_and_slope(gate, ACTIVATION)
    inner = (activated.to(kind).to(tl.float32) * up).to(kind).to(tl.float32)
    dot = tl.sum(back * inner, 1)
    if WITH_SCALED:
        tl.store(scaled + place * WIDTH + n[None, :], (inner * share[:, None]).to(kind), mask)
    if WITH_KEPT:
        back *= share[:, None]
        place *= 2 * WIDTH
        tl.store(grad_kept + place + n[None, :], (back * up * slope).to(kind), mask)
        tl.store(grad_kept + place + WIDTH + n[None, :], (back * activated).to(kind), mask)
    return dot


@triton.jit
def _in_two(
    back,
    kept,
    grad_kept,
    scaled,
    share,
    rows,
    here,
    column,
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    WITH_KEPT: tl.constexpr,
    WITH_SCALED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SPAN: tl.constexpr,
):
    """The same, one half of the columns after the other."""
    one, two = halves(back, BLOCK_M, SPAN // 2)
    dot = activation_backward(
        one, kept, grad_kept, scaled, share, rows, here, column,
        WIDTH, ACTIVATION, WITH_KEPT, WITH_SCALED, BLOCK_M, SPAN // 2,
    )  # fmt: skip
    return dot + activation_backward(
        two, kept, grad_kept, scaled, share, rows, here, column + SPAN // 2,
        WIDTH, ACTIVATION, WITH_KEPT, WITH_SCALED, BLOCK_M, SPAN // 2,
    )  # fmt: skip


@triton.jit
def _inner_backward(
    back,
    kept,
    grad_kept,
    scaled,
    share,
    rows,
    here,
    column,
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    WITH_KEPT: tl.constexpr,
    WITH_SCALED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SPAN: tl.constexpr,
    PART: tl.constexpr,
):
    """The same, in as many parts of at most PART columns as it takes, four at most."""
    if SPAN <= PART:
        return activation_backward(
            back, kept, grad_kept, scaled, share, rows, here, column,
            WIDTH, ACTIVATION, WITH_KEPT, WITH_SCALED, BLOCK_M, SPAN,
        )  # fmt: skip
    elif SPAN <= 2 * PART:
        return _in_two(
            back, kept, grad_kept, scaled, share, rows, here, column,
            WIDTH, ACTIVATION, WITH_KEPT, WITH_SCALED, BLOCK_M, SPAN,
        )  # fmt: skip
    else:
        one, two = halves(back, BLOCK_M, SPAN // 2)
        dot = _in_two(
            one, kept, grad_kept, scaled, share, rows, here, column,
            WIDTH, ACTIVATION, WITH_KEPT, WITH_SCALED, BLOCK_M, SPAN // 2,
        )  # fmt: skip
        return dot + _in_two(
            two, kept, grad_kept, scaled, share, rows, here, column + SPAN // 2,
            WIDTH, ACTIVATION, WITH_KEPT, WITH_SCALED, BLOCK_M, SPAN // 2,
        )  # fmt: skip


@triton.jit(do_not_specialize=["most"])
def inner_backward_kernel(
    grad,  # (T, H)
    weight,  # (E, H, I) of the second product
    table,  # (E, 1) int64
    kept,  # (P, 2 I) gate and up
    weights,  # (P,) routing weights
    grad_kept,  # (P, 2 I)
    scaled,  # (P, I) activation(gate) * up * routing weight
    dots,  # (P, columns) float32 parts of the routing weights' gradients
    pairs,
    ends,
    tiles,
    most: tl.int32,
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    TOP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    WITH_KEPT: tl.constexpr,
    WITH_SCALED: tl.constexpr,
    WITH_DOTS: tl.constexpr,
    LISTED: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PART: tl.constexpr,  # columns that the epilogue takes at a time
):
    COLUMNS: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    work = tl.program_id(0)
    if work >= tl.load(tiles + 2 * most) * COLUMNS:
        return
    # Few columns are taken row by row, or what is read and written of a row lies apart in time.
    TURNS: tl.constexpr = GROUP if COLUMNS > 8 else 1
    expert, _, rows, here, column = tile_of(work, tiles, ends, most, COLUMNS, BLOCK_M, TURNS)
    pair = tl.load(pairs + rows, here, 0)
    origin = origin_of(table, expert, 0, 1, HIDDEN * WIDTH, LISTED)
    back = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    back = product(
        grad, pair // TOP, weight, origin, origin, expert, column, back,
        WIDTH, HIDDEN, HIDDEN, 1, False, False, DESCRIPTOR, PRECISION, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    share = tl.load(weights + pair, here, 0.0).to(tl.float32)
    dot = _inner_backward(
        back, kept, grad_kept, scaled, share, rows, here, column * BLOCK_N,
        WIDTH, ACTIVATION, WITH_KEPT, WITH_SCALED, BLOCK_M, BLOCK_N, PART,
    )  # fmt: skip
    if WITH_DOTS:
        tl.store(dots + pair.to(tl.int64) * COLUMNS + column, dot, here)


@triton.jit
def weight_kernel(
    left,  # (P, M), or (T, M) where LEFT_TOP is given
    right,  # (P, N), or (T, N) where RIGHT_TOP is given
    out,  # (E, M, N)
    pairs,
    ends,
    M: tl.constexpr,
    N: tl.constexpr,
    LEFT_TOP: tl.constexpr,
    RIGHT_TOP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """left^T right over the rows of every expert."""
    DOWN: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    ACROSS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    work = tl.program_id(0)
    expert = work // (DOWN * ACROSS)
    m = work // ACROSS % DOWN * BLOCK_M + tl.arange(0, BLOCK_M)
    n = work % ACROSS * BLOCK_N + tl.arange(0, BLOCK_N)
    start = tl.load(ends + expert - 1, expert > 0, 0)
    end = tl.load(ends + expert)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first = start + tl.arange(0, BLOCK_K)
    pair = tl.load(pairs + first, first < end, 0)
    for place in range(start, end, BLOCK_K):
        rows = place + tl.arange(0, BLOCK_K)  # not carried from step to step, which is slower
        here = rows < end
        i = pair // LEFT_TOP if LEFT_TOP else rows
        j = pair // RIGHT_TOP if RIGHT_TOP else rows
        # Loaded a step ahead, or the loads that it points to could not be.
        pair = tl.load(pairs + rows + BLOCK_K, rows + BLOCK_K < end, 0)
        mask, other = here[:, None], here[:, None]
        if M % BLOCK_M:
            mask = mask & (m < M)[None, :]
        if N % BLOCK_N:
            other = other & (n < N)[None, :]
        a = tl.load(left + i.to(tl.int64)[:, None] * M + m[None, :], mask, 0.0)
        b = tl.load(right + j.to(tl.int64)[:, None] * N + n[None, :], other, 0.0)
        acc = dot_added(tl.trans(a), b, acc, PRECISION)
    spot = out + expert.to(tl.int64) * (M * N) + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(spot, acc.to(out.dtype.element_ty), (m < M)[:, None] & (n < N)[None, :])
