"""What surrounds the grouped products in Triton: the sum over a token's rows, and decoding."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl

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
    n = tl.program_id(0) % COLUMNS * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for slot in tl.static_range(TOP):
        row = tl.load(rows + token * TOP + slot).to(tl.int64)
        value = tl.load(x + row * N + n, (n < N) & (row >= 0), 0.0).to(tl.float32)
        if WEIGHTED:
            value *= tl.load(weights + token * TOP + slot).to(tl.float32)
        total += tl.where(row >= 0, value, 0.0)
    tl.store(out + token.to(tl.int64) * N + n, total.to(out.dtype.element_ty), n < N)


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
    rows = tl.program_id(0) // COLUMNS * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) % COLUMNS * BLOCK_N
    here = rows < tl.load(ends + E - 1)
    share = tl.load(weights + tl.load(pairs + rows, here, 0), here, 0.0).to(tl.float32)
    activation_backward(
        tl.zeros((BLOCK_M, BLOCK_N), tl.float32), kept, kept, scaled, share, rows, here, column,
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
):
    """activation(gate) * up of every pair, without rows sorted.

    Pairs come first, so that those of the same expert meet in the cache.
    """
    pair = tl.program_id(0) % pairs
    n = tl.program_id(0) // pairs * BLOCK_N + tl.arange(0, BLOCK_N)
    expert = tl.load(index + pair).to(tl.int64)
    here = (n < WIDTH) & (expert >= 0) & (expert < E)
    base = weight + expert * (2 * WIDTH * HIDDEN) + n[:, None] * HIDDEN
    token = x + (pair // TOP).to(tl.int64) * HIDDEN
    gate = tl.zeros((BLOCK_N,), tl.float32)
    up = tl.zeros((BLOCK_N,), tl.float32)
    for start in tl.static_range(0, HIDDEN, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        mask = here[:, None] & (k < HIDDEN)[None, :]
        one = tl.load(base + k[None, :], mask, 0.0)
        two = tl.load(base + WIDTH * HIDDEN + k[None, :], mask, 0.0)
        value = tl.load(token + k, k < HIDDEN, 0.0).to(tl.float32)[None, :]
        gate += tl.sum(one.to(tl.float32) * value, 1)
        up += tl.sum(two.to(tl.float32) * value, 1)
    kind = inner.dtype.element_ty
    activated, _ = value_and_slope(gate.to(kind).to(tl.float32), ACTIVATION)
    activated = activated.to(kind).to(tl.float32) * up.to(kind).to(tl.float32)
    tl.store(inner + pair.to(tl.int64) * WIDTH + n, activated.to(kind), n < WIDTH)


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
):
    """The second product of a token's experts and their weighted sum; tokens come first."""
    token = (tl.program_id(0) % tokens).to(tl.int64)
    column = tl.program_id(0) // tokens * BLOCK_N
    line = tl.arange(0, SLOTS * BLOCK_N)
    slot, n = line // BLOCK_N, column + line % BLOCK_N
    pair = token * TOP + slot
    expert = tl.load(index + pair, slot < TOP, E).to(tl.int64)
    here = (n < HIDDEN) & (expert >= 0) & (expert < E)
    base = weight + expert[:, None] * (HIDDEN * WIDTH) + n[:, None] * WIDTH
    acc = tl.zeros((SLOTS * BLOCK_N,), tl.float32)
    for start in tl.static_range(0, WIDTH, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        mask = here[:, None] & (k < WIDTH)[None, :]
        part = tl.load(base + k[None, :], mask, 0.0).to(tl.float32)
        acc += tl.sum(part * tl.load(inner + pair[:, None] * WIDTH + k[None, :], mask, 0.0), 1)
    share = tl.load(weights + pair, here, 0.0).to(tl.float32)
    acc = acc.to(out.dtype.element_ty).to(tl.float32) * share  # as the original rounds it
    total = tl.sum(tl.reshape(acc, (SLOTS, BLOCK_N)), 0)
    n = column + tl.arange(0, BLOCK_N)
    tl.store(out + token * HIDDEN + n, total.to(out.dtype.element_ty), n < HIDDEN)
