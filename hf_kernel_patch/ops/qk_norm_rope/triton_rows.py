"""qk_norm_rope in Triton: reading and writing rows, and the weights of their norms."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from hf_kernel_patch.ops.rope.triton_kernel import load_pairs, load_tail, store_pairs, store_tail


@triton.jit
def load(
    x,
    mask,
    D: tl.constexpr,
    R: tl.constexpr,
    HALF: tl.constexpr,
    TAIL: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Rows in float32: the first and the second elements of their pairs, and what follows."""
    x1, x2 = load_pairs(x, mask, R, HALF, PAIRS)
    return x1, x2, load_tail(x, mask, D, R, TAIL)


@triton.jit
def store(
    out,
    y1,
    y2,
    y3,
    mask,
    D: tl.constexpr,
    R: tl.constexpr,
    HALF: tl.constexpr,
    TAIL: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """The converse of ``load``."""
    store_pairs(out, y1, y2, mask, R, HALF, PAIRS)
    store_tail(out, y3, mask, D, R, TAIL)


@triton.jit
def load_weight(
    weight,
    OFFSET: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    HALF: tl.constexpr,
    TAIL: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """The weight of a row, in its three parts."""
    w1, w2, w3 = load(weight, (tl.arange(0, 1) == 0)[:, None, None], D, R, HALF, TAIL, PAIRS)
    return w1 + OFFSET, w2 + OFFSET, w3 + OFFSET


@triton.jit
def store_sums(
    out,
    s1,
    s2,
    s3,
    D: tl.constexpr,
    R: tl.constexpr,
    HALF: tl.constexpr,
    TAIL: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """The sums over tokens and heads, as one row."""
    s1, s2, s3 = tl.sum(tl.sum(s1, 0), 0), tl.sum(tl.sum(s2, 0), 0), tl.sum(tl.sum(s3, 0), 0)
    s1, s2, s3 = s1[None, None, :], s2[None, None, :], s3[None, None, :]
    store(out, s1, s2, s3, (tl.arange(0, 1) == 0)[:, None, None], D, R, HALF, TAIL, PAIRS)
