"""What surrounds the grouped products in Triton: the sum over a token's rows, and decoding.

For few tokens nothing is sorted, as every pair reads its expert's weights by itself anyway:

1. ``pair_inner_kernel``: activation(gate) * up of some columns of a pair.
2. ``pair_down_kernel``: some columns of a token's output, all of its experts at once.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from hf_kernel_patch.ops._shared.triton_early import begin
from hf_kernel_patch.ops.moe.triton.gradients import activation_backward
from hf_kernel_patch.ops.swiglu.triton import value_and_slope


@triton.jit
def combine_kernel(
    x,  # (R, N)
    rows,  # (P,) the row of each pair, -1 where it has none
    weights,  # (P,) routing weights; not read unless WEIGHTED
    out,  # (T, N)
    N: tl.constexpr,
    TOP: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The weighted sum of every token's rows, slot by slot, in float32."""
    COLUMNS: tl.constexpr = (N + BLOCK - 1) // BLOCK
    token = tl.program_id(0) // COLUMNS
    o_n = tl.program_id(0) % COLUMNS * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for slot in tl.static_range(TOP):
        row = tl.load(rows + token * TOP + slot).to(tl.int64)
        b_x = tl.load(x + row * N + o_n, (o_n < N) & (row >= 0), 0.0).to(tl.float32)
        if WEIGHTED:
            b_x *= tl.load(weights + token * TOP + slot).to(tl.float32)
        # Not added even as zero: the weight of a pair without a row may be anything.
        total += tl.where(row >= 0, b_x, 0.0)
    tl.store(out + token.to(tl.int64) * N + o_n, total.to(out.dtype.element_ty), o_n < N)


@triton.jit
def scaled_kernel(
    kept,  # (P, 2 I) gate and up of every row
    weights,  # (P,) routing weights
    scaled,  # (P, I)
    pairs,
    ends,
    WIDTH: tl.constexpr,
    E: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """activation(gate) * up * routing weight, where nothing else of the backward is needed."""
    COLUMNS: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    o_row = tl.program_id(0) // COLUMNS * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) % COLUMNS * BLOCK_N
    m_row = o_row < tl.load(ends + E - 1)
    o_pair = tl.load(pairs + o_row, m_row, 0)
    routing_weight = tl.load(weights + o_pair, m_row, 0.0).to(tl.float32)
    no_grad = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)  # nothing that is made of it is stored
    activation_backward(
        no_grad, kept, kept, scaled, routing_weight, o_row, m_row, column,
        WIDTH, ACTIVATION, False, True, BLOCK_M, BLOCK_N,
    )  # fmt: skip


@triton.jit(do_not_specialize=["pairs"])
def pair_inner_kernel(
    x,  # (T, H)
    index,  # (P,) experts
    weight,  # (E, 2 I, H)
    inner,  # (P, I)
    pairs: tl.int32,
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    E: tl.constexpr,
    TOP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr,
):
    """activation(gate) * up of every pair, without rows sorted.

    Pairs come first, so that those of the same expert meet in the cache.
    """
    begin(EARLY)
    pair = tl.program_id(0) % pairs
    o_n = tl.program_id(0) // pairs * BLOCK_N + tl.arange(0, BLOCK_N)
    expert = tl.load(index + pair).to(tl.int64)
    m_n = (o_n < WIDTH) & (expert >= 0) & (expert < E)
    p_gate = weight + expert * (2 * WIDTH * HIDDEN) + o_n[:, None] * HIDDEN
    p_x = x + (pair // TOP).to(tl.int64) * HIDDEN
    gate = tl.zeros((BLOCK_N,), tl.float32)
    up = tl.zeros((BLOCK_N,), tl.float32)
    for start in tl.static_range(0, HIDDEN, BLOCK_K):
        o_k = start + tl.arange(0, BLOCK_K)
        mask = m_n[:, None] & (o_k < HIDDEN)[None, :]
        b_gate = tl.load(p_gate + o_k[None, :], mask, 0.0)
        b_up = tl.load(p_gate + WIDTH * HIDDEN + o_k[None, :], mask, 0.0)
        b_x = tl.load(p_x + o_k, o_k < HIDDEN, 0.0).to(tl.float32)[None, :]
        gate += tl.sum(b_gate.to(tl.float32) * b_x, 1)
        up += tl.sum(b_up.to(tl.float32) * b_x, 1)
    dtype = inner.dtype.element_ty  # rounded to it as the original does
    activated, _ = value_and_slope(gate.to(dtype).to(tl.float32), ACTIVATION)
    activated = activated.to(dtype).to(tl.float32) * up.to(dtype).to(tl.float32)
    tl.store(inner + pair.to(tl.int64) * WIDTH + o_n, activated.to(dtype), o_n < WIDTH)


@triton.jit(do_not_specialize=["tokens"])
def pair_down_kernel(
    inner,  # (P, I)
    index,  # (P,) experts
    weights,  # (P,) routing weights
    weight,  # (E, H, I)
    out,  # (T, H)
    tokens: tl.int32,
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    E: tl.constexpr,
    TOP: tl.constexpr,
    SLOTS: tl.constexpr,  # a power of two, TOP at least
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr,
):
    """The second product of a token's experts and their weighted sum; tokens come first."""
    begin(EARLY)
    token = (tl.program_id(0) % tokens).to(tl.int64)
    column = tl.program_id(0) // tokens * BLOCK_N
    # A line is a column of one slot: all of a token's experts are read at the same time.
    o_line = tl.arange(0, SLOTS * BLOCK_N)
    o_slot, o_n = o_line // BLOCK_N, column + o_line % BLOCK_N
    o_pair = token * TOP + o_slot
    expert = tl.load(index + o_pair, o_slot < TOP, E).to(tl.int64)
    m_line = (o_n < HIDDEN) & (expert >= 0) & (expert < E)
    p_weight = weight + expert[:, None] * (HIDDEN * WIDTH) + o_n[:, None] * WIDTH
    acc = tl.zeros((SLOTS * BLOCK_N,), tl.float32)
    for start in tl.static_range(0, WIDTH, BLOCK_K):
        o_k = start + tl.arange(0, BLOCK_K)
        mask = m_line[:, None] & (o_k < WIDTH)[None, :]
        b_weight = tl.load(p_weight + o_k[None, :], mask, 0.0).to(tl.float32)
        b_inner = tl.load(inner + o_pair[:, None] * WIDTH + o_k[None, :], mask, 0.0)
        acc += tl.sum(b_weight * b_inner, 1)
    routing_weight = tl.load(weights + o_pair, m_line, 0.0).to(tl.float32)
    acc = acc.to(out.dtype.element_ty).to(tl.float32) * routing_weight  # as the original rounds it
    total = tl.sum(tl.reshape(acc, (SLOTS, BLOCK_N)), 0)
    o_out = column + tl.arange(0, BLOCK_N)
    tl.store(out + token * HIDDEN + o_out, total.to(out.dtype.element_ty), o_out < HIDDEN)
