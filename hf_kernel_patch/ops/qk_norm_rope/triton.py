"""qk_norm_rope in Triton, the kernels: one read of q and k forward, of gradients too backward.

A row, one head of one token, is held in three parts: the first elements of its pairs, the second
elements, and what is not rotated. Forward, for the heads of a token:
  1. rstd = 1 / sqrt(mean(x^2) + eps), over all three parts;
  2. x rstd w, rounded where the original rounds;
  3. rotate the first two parts; store all three.
Backward:
  1. rotate the gradients back, by the transpose;
  2. dx = rstd (g w - x rstd mean(g w x rstd)), with g the gradient of the scaled row;
  3. dw += g x rstd, in registers, over the tokens that the program loops over;
  4. a second kernel adds up the programs' parts of dw.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from hf_kernel_patch.ops._shared.heads.triton import block_of, dense, heads, rotated, rows
from hf_kernel_patch.ops._shared.triton_early import begin
from hf_kernel_patch.ops.qk_norm_rope.triton_rows import load, load_weight, store, store_sums
from hf_kernel_patch.ops.rope.triton_kernel import load_pairs


@triton.jit
def _dot(a1, a2, a3, b1, b2, b3):
    """(T, H, 1) products of rows."""
    return tl.sum(a1 * b1, 2, True) + tl.sum(a2 * b2, 2, True) + tl.sum(a3 * b3, 2, True)


@triton.jit
def _scaled(normed, w, x_dtype: tl.constexpr, w_dtype: tl.constexpr, CAST_FIRST: tl.constexpr):
    """The normalised rows times the weight, with the original's roundings; float32."""
    if not CAST_FIRST:
        return (normed * w).to(x_dtype).to(tl.float32)
    elif w_dtype == x_dtype:
        return (w * normed.to(x_dtype).to(tl.float32)).to(x_dtype).to(tl.float32)
    else:
        return w * normed.to(x_dtype).to(tl.float32)


@triton.jit
def _normed(
    x1, x2, x3, w1, w2, w3, x_dtype, w_dtype, D: tl.constexpr, EPS: tl.constexpr, CAST_FIRST
):
    """Rows over their root mean square, scaled."""
    rstd = tl.rsqrt(_dot(x1, x2, x3, x1, x2, x3) / D + EPS)
    return (
        _scaled(x1 * rstd, w1, x_dtype, w_dtype, CAST_FIRST),
        _scaled(x2 * rstd, w2, x_dtype, w_dtype, CAST_FIRST),
        _scaled(x3 * rstd, w3, x_dtype, w_dtype, CAST_FIRST),
    )


@triton.jit
def _differentiated(x1, x2, x3, g1, g2, g3, w1, w2, w3, mask, D: tl.constexpr, EPS: tl.constexpr):
    """Gradients of rows, and of their weights, from those of the scaled rows.

    d(x rstd) = rstd (g w - normed mean(g w normed)).
    """
    # A row that is not there has no squares, so that without eps its rstd would be inf.
    rstd = tl.where(mask, tl.rsqrt(_dot(x1, x2, x3, x1, x2, x3) / D + EPS), 0.0)
    x1, x2, x3 = x1 * rstd, x2 * rstd, x3 * rstd
    s1, s2, s3 = g1 * x1, g2 * x2, g3 * x3
    mean = _dot(s1, s2, s3, w1, w2, w3) / D
    d1 = rstd * (g1 * w1 - x1 * mean)
    d2 = rstd * (g2 * w2 - x2 * mean)
    d3 = rstd * (g3 * w3 - x3 * mean)
    return d1, d2, d3, s1, s2, s3


_STRIDES = [f"{name}_{axis}" for name in "qk" for axis in ("batch", "token", "head")]
_GRAD_STRIDES = [f"grad_{name}" for name in _STRIDES]
_COS_STRIDES = ["cos_batch", "cos_token"]


@triton.jit(do_not_specialize=["tokens", *_STRIDES, *_COS_STRIDES])
def forward_kernel(
    q,  # (B, S, QH, D) by strides
    k,  # (B, S, KH, D) by strides
    q_weight,  # (D,)
    k_weight,
    cos,  # (1 or B, 1 or S, R) by strides
    sin,
    q_out,  # (B, S, QH, D), dense
    k_out,
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
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HALF: tl.constexpr,
    TAIL: tl.constexpr,
    PAIRS: tl.constexpr,  # where the pairs of q and k are, and of the angles
    ANGLES: tl.constexpr,
    UNIT: tl.constexpr,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    CAST_FIRST: tl.constexpr,
    EARLY: tl.constexpr,
):
    begin(EARLY)
    batch, t, group = block_of(tl.program_id(0), tokens, GROUPS, 1)
    qh, kh = heads(group, BLOCK_Q), heads(group, BLOCK_K)
    here = t < tokens
    q_mask, k_mask = here & (qh < QH), here & (kh < KH)
    angle = rows(batch, t, 0, cos_batch, cos_token, 0, UNIT)
    q_at = rows(batch, t, qh, q_batch, q_token, q_head, UNIT)
    k_at = rows(batch, t, kh, k_batch, k_token, k_head, UNIT)
    q1, q2, q3 = load(q + q_at, q_mask, D, R, HALF, TAIL, PAIRS)
    k1, k2, k3 = load(k + k_at, k_mask, D, R, HALF, TAIL, PAIRS)
    cos1, cos2 = load_pairs(cos + angle, here, R, HALF, ANGLES)
    sin1, sin2 = load_pairs(sin + angle, here, R, HALF, ANGLES)
    w1, w2, w3 = load_weight(q_weight, OFFSET, D, R, HALF, TAIL, PAIRS)
    v1, v2, v3 = load_weight(k_weight, OFFSET, D, R, HALF, TAIL, PAIRS)
    q1, q2, q3 = _normed(
        q1, q2, q3, w1, w2, w3, q.dtype.element_ty, q_weight.dtype.element_ty, D, EPS, CAST_FIRST
    )
    k1, k2, k3 = _normed(
        k1, k2, k3, v1, v2, v3, k.dtype.element_ty, k_weight.dtype.element_ty, D, EPS, CAST_FIRST
    )
    q1, q2 = rotated(q1, q2, cos1, cos2, sin1, sin2, False)
    k1, k2 = rotated(k1, k2, cos1, cos2, sin1, sin2, False)
    q_out += dense(batch, t, qh, tokens, QH, D, True)
    k_out += dense(batch, t, kh, tokens, KH, D, True)
    store(q_out, q1, q2, q3, q_mask, D, R, HALF, TAIL, PAIRS)
    store(k_out, k1, k2, k3, k_mask, D, R, HALF, TAIL, PAIRS)


@triton.jit(do_not_specialize=["blocks", "tokens", *_STRIDES, *_GRAD_STRIDES, *_COS_STRIDES])
def backward_kernel(
    q,  # (B, S, QH, D) by strides
    k,  # (B, S, KH, D) by strides
    grad_q,  # (B, S, QH, D) by strides, of the results
    grad_k,
    q_weight,  # (D,)
    k_weight,
    cos,  # (1 or B, 1 or S, R) by strides
    sin,
    dq,  # (B, S, QH, D), dense
    dk,
    partial_dw,  # (programs, 2, D) float32, each program's part of the gradients of the weights
    blocks: tl.int32,  # B S GROUPS
    tokens: tl.int32,  # S
    q_batch: tl.int64,  # strides, multiples of UNIT
    q_token: tl.int64,
    q_head: tl.int64,
    k_batch: tl.int64,
    k_token: tl.int64,
    k_head: tl.int64,
    grad_q_batch: tl.int64,
    grad_q_token: tl.int64,
    grad_q_head: tl.int64,
    grad_k_batch: tl.int64,
    grad_k_token: tl.int64,
    grad_k_head: tl.int64,
    cos_batch: tl.int64,
    cos_token: tl.int64,
    QH: tl.constexpr,
    KH: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HALF: tl.constexpr,
    TAIL: tl.constexpr,
    PAIRS: tl.constexpr,  # where the pairs of q and k are, and of the angles
    ANGLES: tl.constexpr,
    UNIT: tl.constexpr,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    WEIGHTS: tl.constexpr,
    STAGES: tl.constexpr,
):
    w1, w2, w3 = load_weight(q_weight, OFFSET, D, R, HALF, TAIL, PAIRS)
    v1, v2, v3 = load_weight(k_weight, OFFSET, D, R, HALF, TAIL, PAIRS)
    q_dw1 = tl.zeros([1, BLOCK_Q, HALF], tl.float32)
    q_dw2 = tl.zeros([1, BLOCK_Q, HALF], tl.float32)
    q_dw3 = tl.zeros([1, BLOCK_Q, TAIL], tl.float32)
    k_dw1 = tl.zeros([1, BLOCK_K, HALF], tl.float32)
    k_dw2 = tl.zeros([1, BLOCK_K, HALF], tl.float32)
    k_dw3 = tl.zeros([1, BLOCK_K, TAIL], tl.float32)
    for block in tl.range(tl.program_id(0), blocks, tl.num_programs(0), num_stages=STAGES):
        batch, t, group = block_of(block, tokens, GROUPS, 1)
        qh, kh = heads(group, BLOCK_Q), heads(group, BLOCK_K)
        here = t < tokens
        q_mask, k_mask = here & (qh < QH), here & (kh < KH)
        angle = rows(batch, t, 0, cos_batch, cos_token, 0, UNIT)
        q_at = rows(batch, t, qh, q_batch, q_token, q_head, UNIT)
        k_at = rows(batch, t, kh, k_batch, k_token, k_head, UNIT)
        gq_at = rows(batch, t, qh, grad_q_batch, grad_q_token, grad_q_head, UNIT)
        gk_at = rows(batch, t, kh, grad_k_batch, grad_k_token, grad_k_head, UNIT)
        q1, q2, q3 = load(q + q_at, q_mask, D, R, HALF, TAIL, PAIRS)
        k1, k2, k3 = load(k + k_at, k_mask, D, R, HALF, TAIL, PAIRS)
        g1, g2, g3 = load(grad_q + gq_at, q_mask, D, R, HALF, TAIL, PAIRS)
        h1, h2, h3 = load(grad_k + gk_at, k_mask, D, R, HALF, TAIL, PAIRS)
        cos1, cos2 = load_pairs(cos + angle, here, R, HALF, ANGLES)
        sin1, sin2 = load_pairs(sin + angle, here, R, HALF, ANGLES)
        g1, g2 = rotated(g1, g2, cos1, cos2, sin1, sin2, True)
        h1, h2 = rotated(h1, h2, cos1, cos2, sin1, sin2, True)
        q1, q2, q3, g1, g2, g3 = _differentiated(q1, q2, q3, g1, g2, g3, w1, w2, w3, q_mask, D, EPS)
        k1, k2, k3, h1, h2, h3 = _differentiated(k1, k2, k3, h1, h2, h3, v1, v2, v3, k_mask, D, EPS)
        q_at = dense(batch, t, qh, tokens, QH, D, True)
        k_at = dense(batch, t, kh, tokens, KH, D, True)
        store(dq + q_at, q1, q2, q3, q_mask, D, R, HALF, TAIL, PAIRS)
        store(dk + k_at, k1, k2, k3, k_mask, D, R, HALF, TAIL, PAIRS)
        if WEIGHTS:
            q_dw1, q_dw2 = q_dw1 + g1, q_dw2 + g2
            k_dw1, k_dw2 = k_dw1 + h1, k_dw2 + h2
            if R < D:
                q_dw3, k_dw3 = q_dw3 + g3, k_dw3 + h3
    if WEIGHTS:
        partial_dw += tl.program_id(0).to(tl.int64) * (2 * D)
        store_sums(partial_dw, q_dw1, q_dw2, q_dw3, D, R, HALF, TAIL, PAIRS)
        store_sums(partial_dw + D, k_dw1, k_dw2, k_dw3, D, R, HALF, TAIL, PAIRS)


@triton.jit(do_not_specialize=["programs"])
def sum_kernel(
    partial_dw,  # (programs, 2, D)
    q_grad,  # (D,)
    k_grad,
    programs: tl.int32,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """Sums the programs' parts, always in the same order: the same bits each time."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([STEP, BLOCK], tl.float32)
    for start in range(0, programs, STEP):
        row = (start + tl.arange(0, STEP))[:, None]
        total += tl.load(
            partial_dw + row * (2 * D) + column, (row < programs) & (column < 2 * D), 0.0
        )
    found = tl.sum(total, 0)
    tl.store(q_grad + column, found.to(q_grad.dtype.element_ty), column < D)
    k_mask = (column >= D) & (column < 2 * D)
    tl.store(k_grad + column - D, found.to(k_grad.dtype.element_ty), k_mask)
