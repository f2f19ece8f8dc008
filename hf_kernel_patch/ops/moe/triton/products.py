"""The grouped products in Triton: a gather in the loads of the first, SwiGLU in its epilogue.

A tile is some rows of one expert, from ``triton_routing.Plan``. E experts, H hidden size, I width
of an expert, T tokens, TOP experts a token, P = T * TOP pairs, as many rows at most.

Weights are stacked, or a tensor for each expert: then ``table`` says where each lies, in units of
LISTED elements from ``weight``; LISTED is 0 where they are stacked.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from hf_kernel_patch.ops.swiglu.triton import value_and_slope


def descriptor(tensor: torch.Tensor, block: tuple[int, ...]) -> Any:
    """What a kernel takes to read blocks of a tensor by the tensor memory accelerator."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(tensor, list(block))


@triton.jit
def tile_of(
    work, tiles, ends, most, COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, GROUP: tl.constexpr
):
    """Expert, first row, rows, which of them there are, and block of columns of a piece of work.

    An expert's tiles come GROUP at a time, column by column: programs that run at the same time
    share what they read of the weights.
    """
    tile = work // COLUMNS
    expert = tl.load(tiles + tile)
    first = tl.load(tiles + most + tile)
    end = tl.load(ends + expert)
    column = work % COLUMNS
    if GROUP > 1:
        start = tl.load(ends + expert - 1, expert > 0, 0)
        before = (first - start) // BLOCK_M
        place = work - (tile - before) * COLUMNS
        group = place // (GROUP * COLUMNS) * GROUP
        size = tl.minimum((end - start + (BLOCK_M - 1)) // BLOCK_M - group, GROUP)
        place = place % (GROUP * COLUMNS)
        first = start + (group + place % size) * BLOCK_M
        column = place // size
    rows = first + tl.arange(0, BLOCK_M)
    return expert, first, rows, rows < end, column


@triton.jit
def origin_of(table, expert, part, PARTS: tl.constexpr, SIZE: tl.constexpr, LISTED: tl.constexpr):
    """Where a part of an expert's weight begins; each has SIZE elements."""
    if LISTED:
        return tl.load(table + expert * PARTS + part) * LISTED
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
    sources,  # (BLOCK_M,) rows of x, or the first one of a descriptor's
    weight,
    origin,  # where the weight, or its first half, begins
    other,  # and its second half
    expert,
    column,
    acc,
    N: tl.constexpr,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    HALVES: tl.constexpr,
    TURN: tl.constexpr,
    FROM_DESCRIPTOR: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """acc + rows of x times a block of columns of the expert's weight.

    TURN is for weights (N, K), otherwise (K, N). With HALVES 2 they are twice (N, K), and the
    columns are a block of the first and the same block of the second.
    """
    k = tl.arange(0, BLOCK_K)
    if not FROM_DESCRIPTOR:
        a = x + sources.to(tl.int64)[:, None] * STRIDE + k[None, :]
    if not DESCRIPTOR:
        j = tl.arange(0, HALVES * BLOCK_N)
        n = column * BLOCK_N + j % BLOCK_N
        n_here = n < N
        if TURN:
            begin = tl.where(j < BLOCK_N, origin, other) + n.to(tl.int64) * K
            b = weight + begin[None, :] + k[:, None]
        else:
            b = weight + origin + n[None, :] + k.to(tl.int64)[:, None] * N
    for start in range(0, K, BLOCK_K):
        if FROM_DESCRIPTOR:
            left = x.load([sources, start])
        else:
            left = tl.load(a, k[None, :] < K - start, 0.0) if K % BLOCK_K else tl.load(a)
            a += BLOCK_K
        if DESCRIPTOR:
            if TURN:
                place = weight.load([expert * HALVES, column * BLOCK_N, start])
                right = tl.trans(place.reshape(HALVES * BLOCK_N, BLOCK_K))
            else:
                place = weight.load([expert, start, column * BLOCK_N])
                right = place.reshape(BLOCK_K, BLOCK_N)
        else:
            if K % BLOCK_K:
                right = tl.load(b, n_here[None, :] & (k[:, None] < K - start), 0.0)
            elif N % BLOCK_N:
                right = tl.load(b, n_here[None, :], 0.0)
            else:
                right = tl.load(b)
            b += BLOCK_K if TURN else BLOCK_K * N
        acc = dot_added(left, right, acc, PRECISION)
    return acc


@triton.jit
def halves(acc, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The two halves of the columns of acc (BLOCK_M, 2 BLOCK_N)."""
    return tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N)), (0, 2, 1)))


@triton.jit(do_not_specialize=["most"])
def gate_up_kernel(
    x,  # (T, H)
    weight,  # (E, 2 I, H), or a descriptor of it as (2 E, I, H)
    table,  # (E, 2) int64
    kept,  # (P, 2 I) gate and up
    inner,  # (P, I) activation(gate) * up
    pairs,
    ends,
    tiles,
    most: tl.int32,
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    TOP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    KEEP: tl.constexpr,  # write gate and up
    LISTED: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    COLUMNS: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    work = tl.program_id(0)
    if work >= tl.load(tiles + 2 * most) * COLUMNS:
        return
    expert, _, rows, here, column = tile_of(work, tiles, ends, most, COLUMNS, BLOCK_M, GROUP)
    sources = tl.load(pairs + rows, here, 0) // TOP
    origin = origin_of(table, expert, 0, 2, WIDTH * HIDDEN, LISTED)
    other = origin_of(table, expert, 1, 2, WIDTH * HIDDEN, LISTED)
    acc = tl.zeros((BLOCK_M, 2 * BLOCK_N), tl.float32)
    acc = product(
        x, sources, weight, origin, other, expert, column, acc,
        WIDTH, HIDDEN, HIDDEN, 2, True, False, DESCRIPTOR, PRECISION, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    kind = inner.dtype.element_ty
    gate, up = halves(acc, BLOCK_M, BLOCK_N)
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = here[:, None] & (n < WIDTH)[None, :]
    place = rows.to(tl.int64)[:, None]
    gate, up = gate.to(kind), up.to(kind)  # as the original rounds them
    if KEEP:
        tl.store(kept + place * (2 * WIDTH) + n[None, :], gate, mask)
        tl.store(kept + place * (2 * WIDTH) + WIDTH + n[None, :], up, mask)
    activated, _ = value_and_slope(gate.to(tl.float32), ACTIVATION)
    activated = activated.to(kind).to(tl.float32) * up.to(tl.float32)
    tl.store(inner + place * WIDTH + n[None, :], activated.to(kind), mask)


@triton.jit(do_not_specialize=["most"])
def rows_kernel(
    x,  # (P, PARTS * K), or a descriptor of it
    weight,  # (E, N, K) where TURN, otherwise (E, PARTS * K, N), or a descriptor
    table,  # (E, PARTS) int64
    out,  # (P, N)
    ends,
    tiles,
    most: tl.int32,
    N: tl.constexpr,
    K: tl.constexpr,
    PARTS: tl.constexpr,  # parts of the weight that lie apart
    TURN: tl.constexpr,
    LOOPS: tl.constexpr,  # programs, where each takes tiles in turn; otherwise 0
    LISTED: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    COLUMNS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    works = tl.load(tiles + 2 * most) * COLUMNS
    step = LOOPS if LOOPS else tl.maximum(works, 1)
    # Flattened, so that the loads of the next tile begin before this one is stored.
    for work in tl.range(tl.program_id(0), works, step, flatten=LOOPS > 0):
        expert, first, rows, here, column = tile_of(
            work, tiles, ends, most, COLUMNS, BLOCK_M, GROUP
        )
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if DESCRIPTOR:
            acc = product(
                x, first, weight, 0, 0, expert, column, acc,
                N, K, K, 1, TURN, True, True, PRECISION, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        else:
            sources = tl.where(here, rows, 0)
            for part in tl.static_range(PARTS):
                origin = origin_of(table, expert, part, PARTS, N * K, LISTED)
                acc = product(
                    x + part * K, sources, weight, origin, origin, expert, column, acc,
                    N, K, PARTS * K, 1, TURN, False, False, PRECISION, BLOCK_N, BLOCK_K,
                )  # fmt: skip
        n = column * BLOCK_N + tl.arange(0, BLOCK_N)
        place = rows.to(tl.int64)[:, None] * N + n[None, :]
        tl.store(out + place, acc.to(out.dtype.element_ty), here[:, None] & (n < N)[None, :])
