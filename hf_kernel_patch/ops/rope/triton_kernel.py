"""The kernel of rope in Triton. Pairs are halves of a row, or neighbours, read as they lie.

  1. A program takes a block of tokens and a group of the heads of q and k.
  2. It loads cos and sin of its tokens once, for all of its heads.
  3. It loads the pairs (a, b) of q and k, and what follows the first R elements of a head.
  4. (a, b) becomes (a cos - b sin, b cos + a sin), or with BACK the transpose of that, in float32.
  5. It stores them rounded once, and what follows unchanged.
The backward is the same kernel with BACK, where results and inputs have changed places.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from hf_kernel_patch.ops._shared.heads.triton import (
    block_of,
    dense,
    heads,
    load_halves,
    rotated,
    rows,
)
from hf_kernel_patch.ops._shared.triton_early import begin

#: Where the elements of a pair are: in the halves of a row, or side by side. ONE is for angles that
#: hold for both.
IN_HALVES, SIDE_BY_SIDE, ONE = 0, 1, 2
_SIDE_BY_SIDE, _ONE = tl.constexpr(SIDE_BY_SIDE), tl.constexpr(ONE)


@triton.jit
def load_pairs(x, mask, R: tl.constexpr, HALF: tl.constexpr, PLACES: tl.constexpr):
    """The first and the second elements, (.., HALF), of the pairs of rows, in float32."""
    if PLACES == _SIDE_BY_SIDE:
        # The row is read as it lies, 16 bytes a thread. Both elements of a pair are then in the
        # registers of one thread, so that taking them apart moves nothing.
        c = tl.arange(0, 2 * HALF)[None, None, :]
        row = tl.load(x + c, mask & (c < R), 0.0).to(tl.float32)
        return tl.split(tl.reshape(row, [row.shape[0], row.shape[1], HALF, 2]))
    elif PLACES == _ONE:
        c = tl.arange(0, HALF)[None, None, :]
        both = tl.load(x + c, mask & (c < R // 2), 0.0).to(tl.float32)
        return both, both
    else:
        return load_halves(x, mask, R, HALF)


@triton.jit
def store_pairs(
    out, first, second, mask, R: tl.constexpr, HALF: tl.constexpr, PLACES: tl.constexpr
):
    """The converse of ``load_pairs``."""
    first, second = first.to(out.dtype.element_ty), second.to(out.dtype.element_ty)
    if PLACES == _SIDE_BY_SIDE:
        c = tl.arange(0, 2 * HALF)[None, None, :]
        row = tl.reshape(tl.join(first, second), [first.shape[0], first.shape[1], 2 * HALF])
        tl.store(out + c, row, mask & (c < R))
    else:
        c = tl.arange(0, HALF)[None, None, :]
        half = mask & (c < R // 2)
        tl.store(out + c, first, half)
        tl.store(out + c + R // 2, second, half)


@triton.jit
def load_tail(x, mask, D: tl.constexpr, R: tl.constexpr, TAIL: tl.constexpr):
    """What follows the first R elements of rows of D, (.., TAIL), if anything does."""
    if R < D:
        c = R + tl.arange(0, TAIL)[None, None, :]
        return tl.load(x + c, mask & (c < D), 0.0).to(tl.float32)
    else:
        return tl.zeros([1, 1, 1], tl.float32)


@triton.jit
def store_tail(out, tail, mask, D: tl.constexpr, R: tl.constexpr, TAIL: tl.constexpr):
    """The converse of ``load_tail``."""
    if R < D:
        c = R + tl.arange(0, TAIL)[None, None, :]
        tl.store(out + c, tail.to(out.dtype.element_ty), mask & (c < D))


@triton.jit(
    do_not_specialize=[
        "tokens",
        *("q_batch", "q_token", "q_head", "k_batch", "k_token", "k_head"),
        *("cos_batch", "cos_token"),
    ]
)
def rope_kernel(
    q,  # (B, S, QH, D) by strides
    k,  # (B, S, KH, D) by strides
    q_out,  # dense
    k_out,
    cos,  # (1 or B, 1 or S, R) by strides
    sin,
    tokens: tl.int32,  # S
    q_batch: tl.int64,  # strides, multiples of UNIT
    q_token: tl.int64,
    q_head: tl.int64,
    k_batch: tl.int64,
    k_token: tl.int64,
    k_head: tl.int64,
    cos_batch: tl.int64,
    cos_token: tl.int64,
    QH: tl.constexpr,
    KH: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HALF: tl.constexpr,
    TAIL: tl.constexpr,
    INNER: tl.constexpr,
    BACK: tl.constexpr,
    READ: tl.constexpr,  # where the pairs of q and k are, of the results, and of the angles
    WRITTEN: tl.constexpr,
    ANGLES: tl.constexpr,
    UNIT: tl.constexpr,
    EARLY: tl.constexpr,
):
    begin(EARLY)
    batch, t, group = block_of(tl.program_id(0), tokens, GROUPS, BLOCK_T)
    here = t < tokens
    qh = heads(group, BLOCK_Q)
    q_mask = here & (qh < QH)
    q += rows(batch, t, qh, q_batch, q_token, q_head, UNIT)
    q1, q2 = load_pairs(q, q_mask, R, HALF, READ)
    q3 = load_tail(q, q_mask, D, R, TAIL)
    if KH > 0:  # k may be absent
        kh = heads(group, BLOCK_K)
        k_mask = here & (kh < KH)
        k += rows(batch, t, kh, k_batch, k_token, k_head, UNIT)
        k1, k2 = load_pairs(k, k_mask, R, HALF, READ)
        k3 = load_tail(k, k_mask, D, R, TAIL)
    angle = rows(batch, t, 0, cos_batch, cos_token, 0, UNIT)
    cos1, cos2 = load_pairs(cos + angle, here, R, HALF, ANGLES)
    sin1, sin2 = load_pairs(sin + angle, here, R, HALF, ANGLES)
    q1, q2 = rotated(q1, q2, cos1, cos2, sin1, sin2, BACK)
    q_out += dense(batch, t, qh, tokens, QH, D, INNER)
    store_pairs(q_out, q1, q2, q_mask, R, HALF, WRITTEN)
    store_tail(q_out, q3, q_mask, D, R, TAIL)
    if KH > 0:
        k1, k2 = rotated(k1, k2, cos1, cos2, sin1, sin2, BACK)
        k_out += dense(batch, t, kh, tokens, KH, D, INNER)
        store_pairs(k_out, k1, k2, k_mask, R, HALF, WRITTEN)
        store_tail(k_out, k3, k_mask, D, R, TAIL)
