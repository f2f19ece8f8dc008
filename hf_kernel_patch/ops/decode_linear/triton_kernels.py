"""The kernels of :mod:`hf_kernel_patch.ops.decode_linear.triton`.

What bounds them is reading the weights, each byte of which is read once. A program takes BLOCK_N
rows of one weight and all of K.

1. find the weight of this program, and load the first of it while the launch before is still
running (programmatic dependent launch), as that does not write weights; 2. wait for that launch,
which may have written x; 3. sum over K in float32; 4. add the bias, round, and store.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from hf_kernel_patch.ops._shared.triton_early import gdc_launch_dependents, gdc_wait
from hf_kernel_patch.ops.swiglu.triton import value_and_slope


@triton.jit
def _elementwise(
    x,
    p_w,
    x_stride,
    rows,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr,
):
    """The product of all rows of x with the rows at p_w, (rows of p_w, BLOCK_M) in float32.

    The next block of the weight is on its way while one is multiplied; the first one is before x
    is even known.
    """
    LAST: tl.constexpr = (K - 1) // BLOCK_K * BLOCK_K
    o_k = tl.arange(0, BLOCK_K)[None, None, :]
    # Rows beyond the last are the last again: cheaper than a mask, and never stored.
    o_m = tl.minimum(tl.arange(0, BLOCK_M), rows - 1)
    p_x = x + o_m[None, :, None] * x_stride + o_k
    p_w = p_w[:, None, None] + o_k
    whole: tl.constexpr = LAST > 0 or K % BLOCK_K == 0
    b_w = tl.load(p_w) if whole else tl.load(p_w, mask=o_k < K, other=0.0)
    if EARLY:
        gdc_wait()
    total = tl.zeros((p_w.shape[0], BLOCK_M, BLOCK_K), tl.float32)
    for k in range(BLOCK_K, K, BLOCK_K):
        if K % BLOCK_K == 0:
            b_next = tl.load(p_w + k)
        else:
            b_next = tl.load(p_w + k, mask=k + o_k < K, other=0.0)
        b_x = tl.load(p_x + (k - BLOCK_K))
        total += b_w.to(tl.float32) * b_x.to(tl.float32)
        b_w = b_next
    if K % BLOCK_K == 0:
        b_x = tl.load(p_x + LAST)
    else:
        b_x = tl.load(p_x + LAST, mask=LAST + o_k < K, other=0.0)
    total += b_w.to(tl.float32) * b_x.to(tl.float32)
    return tl.sum(total, axis=2)


@triton.jit
def _tensor_cores(
    x,
    p_w,
    x_stride,
    rows,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
):
    """As :func:`_elementwise`, by tl.dot."""
    o_k = tl.arange(0, BLOCK_K)
    if EARLY:
        gdc_wait()
    o_m = tl.minimum(tl.arange(0, BLOCK_M), rows - 1)
    p_x = x + o_m[None, :] * x_stride + o_k[:, None]
    p_w = p_w[:, None] + o_k[None, :]
    total = tl.zeros((p_w.shape[0], BLOCK_M), tl.float32)
    for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        if K % BLOCK_K == 0:
            b_w = tl.load(p_w + k)
            b_x = tl.load(p_x + k)
        else:
            b_w = tl.load(p_w + k, mask=(k + o_k < K)[None, :], other=0.0)
            b_x = tl.load(p_x + k, mask=(k + o_k < K)[:, None], other=0.0)
        total = tl.dot(b_w, b_x, total, input_precision="ieee")
    return total


@triton.jit
def _store(total, out, bias, biased, o_n, n, rows, BLOCK_M: tl.constexpr):
    """Add the bias, round to the dtype of ``out``, store, and return what was stored."""
    m_n = o_n < n
    b_bias = tl.load(bias + o_n, mask=m_n & biased, other=0.0).to(tl.float32)
    rounded = (total + b_bias[:, None]).to(out.dtype.element_ty)
    o_m = tl.arange(0, BLOCK_M)[None, :]
    mask = m_n[:, None] & (o_m < rows)
    tl.store(out + o_m * n + o_n[:, None], rounded, mask=mask)
    return rounded


@triton.jit
def linears_kernel(
    x,  # (rows, K) by x_stride
    weights,  # tuple of (n, K) by strides
    biases,  # tuple of (n,); anything where BIASED has no bit
    outs,  # tuple of (rows, n), dense
    ns,
    strides,
    x_stride,
    rows,
    COUNT: tl.constexpr,
    BIASED: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        gdc_launch_dependents()
    program = tl.program_id(0)
    weight, bias, out, n, stride = weights[0], biases[0], outs[0], ns[0], strides[0]
    index = program * 0
    start = program * 0  # the first program of this weight
    end = tl.cdiv(ns[0], BLOCK_N)
    for i in tl.static_range(1, COUNT):
        beyond = program >= end
        weight = tl.where(beyond, weights[i], weight)
        bias = tl.where(beyond, biases[i], bias)
        out = tl.where(beyond, outs[i], out)
        n = tl.where(beyond, ns[i], n)
        stride = tl.where(beyond, strides[i], stride)
        start = tl.where(beyond, end, start)
        index += beyond.to(tl.int32)
        end += tl.cdiv(ns[i], BLOCK_N)
    o_n = (program - start) * BLOCK_N + tl.arange(0, BLOCK_N)
    p_w = weight + tl.minimum(o_n, n - 1).to(tl.int64) * stride
    if STAGES == 0:
        total = _elementwise(x, p_w, x_stride, rows, K, BLOCK_M, BLOCK_K, EARLY)
    else:
        total = _tensor_cores(x, p_w, x_stride, rows, K, BLOCK_M, BLOCK_K, STAGES, EARLY)
    biased = (BIASED >> index) & 1 != 0
    _store(total, out, bias, biased, o_n, n, rows, BLOCK_M)


@triton.jit
def gated_kernel(
    x,  # (rows, K) by x_stride
    weights,  # gate and up, (n, K) by strides
    biases,  # (n,); anything where BIASED has no bit
    outs,  # gate, up and product, (rows, n), dense
    n,
    strides,
    x_stride,
    rows,
    ACTIVATION: tl.constexpr,
    BIASED: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        gdc_launch_dependents()
    # A row of gate and the same row of up take turns, so that one loop reads both.
    first = tl.program_id(0) * (BLOCK_N // 2)
    both = tl.arange(0, BLOCK_N)
    o_both = tl.minimum(first + both // 2, n - 1).to(tl.int64)
    p_w = tl.where(
        both % 2 == 0, weights[0] + o_both * strides[0], weights[1] + o_both * strides[1]
    )
    if STAGES == 0:
        total = _elementwise(x, p_w, x_stride, rows, K, BLOCK_M, BLOCK_K, EARLY)
    else:
        total = _tensor_cores(x, p_w, x_stride, rows, K, BLOCK_M, BLOCK_K, STAGES, EARLY)
    pairs = tl.reshape(total, (BLOCK_N // 2, 2, BLOCK_M))
    gate, up = tl.split(tl.permute(pairs, (0, 2, 1)))
    o_n = first + tl.arange(0, BLOCK_N // 2)
    gate = _store(gate, outs[0], biases[0], BIASED & 1 != 0, o_n, n, rows, BLOCK_M)
    up = _store(up, outs[1], biases[1], BIASED & 2 != 0, o_n, n, rows, BLOCK_M)
    activated, _ = value_and_slope(gate.to(tl.float32), ACTIVATION)
    activated = activated.to(outs[2].dtype.element_ty).to(tl.float32)  # as the original rounds it
    product = activated * up.to(tl.float32)
    _store(product, outs[2], biases[0], False, o_n, n, rows, BLOCK_M)
