"""The grouped products in Triton: a gather in the loads of the first, SwiGLU in its epilogue.

E experts, H hidden size, I width of an expert, T tokens, TOP experts a token, P = T * TOP pairs
and as many rows at most, sorted by expert (``routing.Routing``).

The forward:

1. ``gate_up_kernel``: the rows' tokens are gathered while they are loaded, times gate and up of
   their expert at once; SwiGLU on the sums while they are in registers.
2. ``rows_kernel``: times down, a row each. The backward gets the gradient of its input by it, too.
3. ``rowwise.combine_kernel``: the weighted sum of a token's rows.

A program computes a tile of the output: some rows, all of one expert, and a block of columns.

Weights are stacked, or a tensor for each expert. Then ``offsets`` says where each of them begins,
in units of UNIT elements from ``weight``; UNIT is 0 where they are stacked.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from hf_kernel_patch.ops.swiglu.triton import value_and_slope


@triton.jit
def tile_of(
    tile, tiles, ends, max_tiles, COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, GROUP: tl.constexpr
):
    """A tile's expert, first row, rows, their mask, and its block of columns.

    An expert's tiles come GROUP at a time, column by column: programs that run at the same time
    share what they read of the weights.
    """
    row_tile = tile // COLUMNS
    expert = tl.load(tiles + row_tile)
    first = tl.load(tiles + max_tiles + row_tile)
    end = tl.load(ends + expert)
    column = tile % COLUMNS
    if GROUP > 1:
        start = tl.load(ends + expert - 1, expert > 0, 0)
        row_tiles_before = (first - start) // BLOCK_M  # of the same expert
        i = tile - (row_tile - row_tiles_before) * COLUMNS  # among all tiles of the expert
        group = i // (GROUP * COLUMNS) * GROUP
        size = tl.minimum((end - start + (BLOCK_M - 1)) // BLOCK_M - group, GROUP)
        i = i % (GROUP * COLUMNS)
        first = start + (group + i % size) * BLOCK_M
        column = i // size
    o_row = first + tl.arange(0, BLOCK_M)
    return expert, first, o_row, o_row < end, column


@triton.jit
def weight_offset(
    offsets, expert, part, PARTS: tl.constexpr, SIZE: tl.constexpr, UNIT: tl.constexpr
):
    """Where a part of an expert's weight begins, in elements; each part has SIZE of them."""
    if UNIT:
        return tl.load(offsets + expert * PARTS + part) * UNIT
    else:
        return (expert.to(tl.int64) * PARTS + part) * SIZE


@triton.jit
def dot_added(left, right, acc, PRECISION: tl.constexpr):
    """acc + left times right.

    In float32 the steps' sums are added up apart, as one long sum has a larger error. With
    max_num_imprecise_acc, which says nothing about float32, Triton leaves the addition as it is.
    """
    if left.dtype == tl.float32:
        return acc + tl.dot(left, right, input_precision=PRECISION, max_num_imprecise_acc=1)
    else:
        return tl.dot(left, right, acc, input_precision=PRECISION)


@triton.jit
def product(
    x,  # (any, K), rows STRIDE apart, or a descriptor of it
    o_row,  # (BLOCK_M,) rows of x, or the first one of a descriptor's
    weight,
    o_weight,  # where the weight, or its first half, begins
    o_second,  # and its second half
    expert,
    column,
    acc,
    N: tl.constexpr,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    HALVES: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    FROM_DESCRIPTOR: tl.constexpr,  # whether x is one, and
    DESCRIPTOR: tl.constexpr,  # whether the weight is
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """acc + rows of x times a block of columns of the expert's weight.

    Weights are (N, K) where TRANSPOSE, otherwise (K, N). With HALVES 2 they are twice (N, K), and
    the columns are a block of the first and the same block of the second.
    """
    o_k = tl.arange(0, BLOCK_K)
    if not FROM_DESCRIPTOR:
        p_x = x + o_row.to(tl.int64)[:, None] * STRIDE + o_k[None, :]
    if not DESCRIPTOR:
        j = tl.arange(0, HALVES * BLOCK_N)
        o_n = column * BLOCK_N + j % BLOCK_N
        m_n = o_n < N
        if TRANSPOSE:
            o_line = tl.where(j < BLOCK_N, o_weight, o_second) + o_n.to(tl.int64) * K
            p_weight = weight + o_line[None, :] + o_k[:, None]
        else:
            p_weight = weight + o_weight + o_n[None, :] + o_k.to(tl.int64)[:, None] * N
    for start in range(0, K, BLOCK_K):
        # Masks only where a size is no multiple of its block: they cost registers and time.
        if FROM_DESCRIPTOR:
            b_x = x.load([o_row, start])
        else:
            b_x = tl.load(p_x, o_k[None, :] < K - start, 0.0) if K % BLOCK_K else tl.load(p_x)
            p_x += BLOCK_K
        if DESCRIPTOR:
            if TRANSPOSE:
                b_block = weight.load([expert * HALVES, column * BLOCK_N, start])
                b_weight = tl.trans(b_block.reshape(HALVES * BLOCK_N, BLOCK_K))
            else:
                b_block = weight.load([expert, start, column * BLOCK_N])
                b_weight = b_block.reshape(BLOCK_K, BLOCK_N)
        else:
            if K % BLOCK_K:
                b_weight = tl.load(p_weight, m_n[None, :] & (o_k[:, None] < K - start), 0.0)
            elif N % BLOCK_N:
                b_weight = tl.load(p_weight, m_n[None, :], 0.0)
            else:
                b_weight = tl.load(p_weight)
            p_weight += BLOCK_K if TRANSPOSE else BLOCK_K * N
        acc = dot_added(b_x, b_weight, acc, PRECISION)
    return acc


@triton.jit
def halves(acc, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The two halves of the columns of acc (BLOCK_M, 2 BLOCK_N)."""
    return tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N)), (0, 2, 1)))


@triton.jit(do_not_specialize=["max_tiles"])
def gate_up_kernel(
    x,  # (T, H)
    weight,  # (E, 2 I, H), or a descriptor of it as (2 E, I, H)
    offsets,  # (E, 2) int64
    kept,  # (P, 2 I) gate and up
    inner,  # (P, I) activation(gate) * up
    pairs,
    ends,
    tiles,
    max_tiles: tl.int32,
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    TOP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    KEEP: tl.constexpr,  # write gate and up
    UNIT: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    COLUMNS: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0)
    # The host launches for as many tiles as there may be; the device knows how many there are.
    if tile >= tl.load(tiles + 2 * max_tiles) * COLUMNS:
        return
    expert, _, o_row, m_row, column = tile_of(tile, tiles, ends, max_tiles, COLUMNS, BLOCK_M, GROUP)
    o_token = tl.load(pairs + o_row, m_row, 0) // TOP
    o_gate = weight_offset(offsets, expert, 0, 2, WIDTH * HIDDEN, UNIT)
    o_up = weight_offset(offsets, expert, 1, 2, WIDTH * HIDDEN, UNIT)
    # Gate and up in one product: what is loaded of x serves both, and both meet in registers.
    acc = tl.zeros((BLOCK_M, 2 * BLOCK_N), tl.float32)
    acc = product(
        x, o_token, weight, o_gate, o_up, expert, column, acc,
        WIDTH, HIDDEN, HIDDEN, 2, True, False, DESCRIPTOR, PRECISION, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    dtype = inner.dtype.element_ty
    gate, up = halves(acc, BLOCK_M, BLOCK_N)
    o_n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = m_row[:, None] & (o_n < WIDTH)[None, :]
    o_line = o_row.to(tl.int64)[:, None]
    gate, up = gate.to(dtype), up.to(dtype)  # as the original rounds them
    if KEEP:
        tl.store(kept + o_line * (2 * WIDTH) + o_n[None, :], gate, mask)
        tl.store(kept + o_line * (2 * WIDTH) + WIDTH + o_n[None, :], up, mask)
    activated, _ = value_and_slope(gate.to(tl.float32), ACTIVATION)
    activated = activated.to(dtype).to(tl.float32) * up.to(tl.float32)
    tl.store(inner + o_line * WIDTH + o_n[None, :], activated.to(dtype), mask)


@triton.jit(do_not_specialize=["max_tiles"])
def rows_kernel(
    x,  # (P, PARTS * K), or a descriptor of it
    weight,  # (E, N, K) where TRANSPOSE, otherwise (E, PARTS * K, N), or a descriptor
    offsets,  # (E, PARTS) int64
    out,  # (P, N)
    ends,
    tiles,
    max_tiles: tl.int32,
    N: tl.constexpr,
    K: tl.constexpr,
    PARTS: tl.constexpr,  # parts of the weight that lie apart
    TRANSPOSE: tl.constexpr,
    PROGRAMS: tl.constexpr,  # where each program loops over tiles; otherwise 0
    UNIT: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    COLUMNS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    tile_count = tl.load(tiles + 2 * max_tiles) * COLUMNS
    # Without a loop over tiles the step is past the last tile: a program takes one, or none.
    step = PROGRAMS if PROGRAMS else tl.maximum(tile_count, 1)
    # Flattened, so that the loads of the next tile begin before this one is stored.
    for tile in tl.range(tl.program_id(0), tile_count, step, flatten=PROGRAMS > 0):
        expert, first, o_row, m_row, column = tile_of(
            tile, tiles, ends, max_tiles, COLUMNS, BLOCK_M, GROUP
        )
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if DESCRIPTOR:
            # Rows of the next expert come along at an expert's end; the store leaves them out.
            acc = product(
                x, first, weight, 0, 0, expert, column, acc,
                N, K, K, 1, TRANSPOSE, True, True, PRECISION, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        else:
            o_x = tl.where(m_row, o_row, 0)
            for part in tl.static_range(PARTS):
                o_part = weight_offset(offsets, expert, part, PARTS, N * K, UNIT)
                acc = product(
                    x + part * K, o_x, weight, o_part, o_part, expert, column, acc,
                    N, K, PARTS * K, 1, TRANSPOSE, False, False, PRECISION, BLOCK_N, BLOCK_K,
                )  # fmt: skip
        o_n = column * BLOCK_N + tl.arange(0, BLOCK_N)
        o_out = o_row.to(tl.int64)[:, None] * N + o_n[None, :]
        tl.store(out + o_out, acc.to(out.dtype.element_ty), m_row[:, None] & (o_n < N)[None, :])
