"""The kernels over rows of logits: what stands between the products of linear_cross_entropy.

A logit is scaled and capped, y = c tanh(s x / c). With p = exp(y - L), L = log sum exp y, a row's
loss is (1 - e) (L - y_t) + e (L - mean y) + z L^2 and its gradient by y is
p (1 + 2 z L) - (1 - e) [t] - e / V.

Whole rows (``rows_kernel``), a row at a time to a program:
  1. one pass over the row: max y and sum exp(y - max), rescaled whenever the max grows (the online
     softmax of Milakov and Gimelshein 2018, arXiv:1805.02867), and what metrics and smoothing need;
  2. the loss from these and the label's y;
  3. a second pass, mostly from the cache: the gradient in place of the logits.
Slices of the vocabulary: ``observe_kernel`` does step 1 for a slice and merges it into the row's
state; when all slices were seen, ``logits_grad_kernel`` does step 3 for each.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl

_NUMBERS = ["rows", "stride", "ignored", "scale", "softcap", "smoothing", "z_loss"]


@triton.jit
def _tanh(u):
    """By exp where it cancels little, by its series (to u^9) where it would."""
    e = tl.exp(-2.0 * tl.abs(u))
    far = (1.0 - e) / (1.0 + e)
    far = tl.where(u < 0.0, -far, far)
    w = u * u
    near = u * (1.0 + w * (-1.0 / 3 + w * (2.0 / 15 + w * (-17.0 / 315 + w * (62.0 / 2835)))))
    return tl.where(w < 0.0625, near, far)


@triton.jit
def _capped(x, scale, softcap, CAPPED: tl.constexpr):
    y = x.to(tl.float32) * scale
    if CAPPED:
        y = softcap * _tanh(y / softcap)
    return y


@triton.jit
def _columns(begin, BLOCK: tl.constexpr):
    """(BLOCK / 8, 8) columns; the eight of a lane are one load of a thread.

    Each lane keeps a max and sums of its own, so that lanes meet once a row and not once a block.
    """
    return begin + tl.arange(0, BLOCK // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]


@triton.jit
def _scan(
    x,
    scale,
    softcap,
    WIDTH: tl.constexpr,
    CAPPED: tl.constexpr,
    SMOOTHED: tl.constexpr,
    METRICS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of one row: max y, sum exp(y - max), sum y, sum exp(y - max) y, and the first max's place."""
    high = tl.full([BLOCK // 8], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK // 8], tl.float32)
    plain = tl.zeros([BLOCK // 8], tl.float32)
    heavy = tl.zeros([BLOCK // 8], tl.float32)
    best = tl.zeros([BLOCK // 8], tl.int32)
    for begin in tl.range(0, WIDTH, BLOCK):
        at = _columns(begin, BLOCK)
        there = at < WIDTH
        y = _capped(
            tl.load(x + at, there, 0.0, eviction_policy="evict_last"), scale, softcap, CAPPED
        )
        if SMOOTHED:
            plain += tl.sum(tl.where(there, y, 0.0), 1)
        y = tl.where(there, y, float("-inf"))
        most = tl.max(y, 1)
        if METRICS:
            first = tl.min(tl.where(y == most[:, None], at, WIDTH), 1)
            best = tl.where(most > high, first, best)
        most = tl.maximum(most, high)
        # A lane that has seen nothing but -inf would compute -inf - -inf.
        base = tl.where(most == float("-inf"), 0.0, most)
        p = tl.exp(y - base[:, None])
        shrink = tl.exp(high - base)
        total = total * shrink + tl.sum(p, 1)
        if METRICS:
            heavy = heavy * shrink + tl.sum(tl.where(p > 0.0, p * y, 0.0), 1)
        high = most
    most = tl.max(high, 0)
    base = tl.where(most == float("-inf"), 0.0, most)
    shrink = tl.exp(high - base)
    first = tl.min(tl.where(high == most, best, WIDTH), 0)
    return most, tl.sum(total * shrink, 0), tl.sum(plain, 0), tl.sum(heavy * shrink, 0), first


@triton.jit
def _logits_grad(
    x,
    high,
    log,
    target,
    factor,
    scale,
    softcap,
    smoothing,
    z_loss,
    WIDTH: tl.constexpr,
    VOCABULARY: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient of one row's loss by its logits, times factor, in place of the logits.

    L is high + log, apart since each alone rounds less.
    """
    slope = 1.0 + 2.0 * z_loss * (high + log)
    for begin in tl.range(0, WIDTH, BLOCK):
        at = _columns(begin, BLOCK)
        there = at < WIDTH
        y = _capped(
            tl.load(x + at, there, 0.0, eviction_policy="evict_first"), scale, softcap, CAPPED
        )
        g = tl.exp((y - high) - log) * slope - smoothing / VOCABULARY
        g = tl.where(at == target, g - (1.0 - smoothing), g)
        if CAPPED:
            ratio = y / softcap
            g *= 1.0 - ratio * ratio
        tl.store(x + at, (g * (factor * scale)).to(x.dtype.element_ty), there)


@triton.jit
def _clear(x, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    for begin in tl.range(0, WIDTH, BLOCK):
        at = _columns(begin, BLOCK)
        tl.store(x + at, tl.zeros([BLOCK // 8, 8], x.dtype.element_ty), at < WIDTH)


@triton.jit
def _at_target(x, target, scale, softcap, WIDTH: tl.constexpr, CAPPED: tl.constexpr):
    """The label's y; NaN for a label outside of the row."""
    inside = (target >= 0) & (target < WIDTH)
    raw = tl.load(x + target, inside, float("nan"))
    return _capped(raw, scale, softcap, CAPPED)


@triton.jit(do_not_specialize=[*_NUMBERS, "count"])
def rows_kernel(
    logits,  # (count, WIDTH); becomes their gradient
    targets,  # (count,) int64
    factor,  # () float32, times which the gradient is
    out,  # (3, rows) float32, from this chunk's first row on
    count: tl.int64,
    rows: tl.int64,
    stride: tl.int64,  # from row to row of logits, in units of PAD
    ignored: tl.int64,
    scale: tl.float32,
    softcap: tl.float32,
    smoothing: tl.float32,
    z_loss: tl.float32,
    WIDTH: tl.constexpr,
    CAPPED: tl.constexpr,
    SMOOTHED: tl.constexpr,
    METRICS: tl.constexpr,
    GRADIENT: tl.constexpr,
    PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    for row in range(tl.program_id(0).to(tl.int64), count, tl.num_programs(0)):
        x = logits + row * (stride * PAD)
        target = tl.load(targets + row)
        if target == ignored:
            if GRADIENT:
                _clear(x, WIDTH, BLOCK)
        else:
            # Before the scan, whose barriers keep it from what another warp writes afterwards.
            y = _at_target(x, target, scale, softcap, WIDTH, CAPPED)
            most, total, plain, heavy, best = _scan(
                x, scale, softcap, WIDTH, CAPPED, SMOOTHED, METRICS, BLOCK
            )
            log = tl.log(total)
            loss = (most - y) + log
            if SMOOTHED:
                loss += smoothing * (y - plain / WIDTH)
            tl.store(out + row, loss + z_loss * (most + log) * (most + log))
            if METRICS:
                tl.store(out + rows + row, (best == target).to(tl.float32))
                tl.store(out + 2 * rows + row, (most - heavy / total) + log)
            if GRADIENT:
                f, e, cap = tl.load(factor), smoothing, softcap
                _logits_grad(
                    x, most, log, target, f, scale, cap, e, z_loss, WIDTH, WIDTH, CAPPED, BLOCK
                )


@triton.jit(do_not_specialize=[*_NUMBERS, "begin"])
def observe_kernel(
    logits,  # (rows, WIDTH), the columns from begin on
    targets,  # (rows,) int64
    state,  # (6, rows) float32: max, sum, label's y, sum y, sum p y, place of the max
    rows: tl.int64,
    stride: tl.int64,
    ignored: tl.int64,
    begin: tl.int64,
    scale: tl.float32,
    softcap: tl.float32,
    WIDTH: tl.constexpr,
    CAPPED: tl.constexpr,
    SMOOTHED: tl.constexpr,
    METRICS: tl.constexpr,
    PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x = logits + row * (stride * PAD)
    target = tl.load(targets + row)
    if target != ignored:
        state += row
        most, total, plain, heavy, best = _scan(
            x, scale, softcap, WIDTH, CAPPED, SMOOTHED, METRICS, BLOCK
        )
        before = tl.load(state)
        high = tl.maximum(most, before)
        base = tl.where(high == float("-inf"), 0.0, high)
        old, new = tl.exp(before - base), tl.exp(most - base)
        tl.store(state, high)
        tl.store(state + rows, tl.load(state + rows) * old + total * new)
        if (target >= begin) & (target < begin + WIDTH):
            y = _at_target(x, target - begin, scale, softcap, WIDTH, CAPPED)
            tl.store(state + 2 * rows, y)
        if SMOOTHED:
            tl.store(state + 3 * rows, tl.load(state + 3 * rows) + plain)
        if METRICS:
            tl.store(state + 4 * rows, tl.load(state + 4 * rows) * old + heavy * new)
            if most > before:
                tl.store(state + 5 * rows, (begin + best).to(tl.float32))


@triton.jit(do_not_specialize=[*_NUMBERS, "begin"])
def logits_grad_kernel(
    logits,  # (rows, WIDTH), the columns from begin on; becomes their gradient
    targets,  # (rows,) int64
    logs,  # (2, rows) float32: the two parts of L
    factor,  # () float32
    rows: tl.int64,
    stride: tl.int64,
    ignored: tl.int64,
    begin: tl.int64,
    scale: tl.float32,
    softcap: tl.float32,
    smoothing: tl.float32,
    z_loss: tl.float32,
    WIDTH: tl.constexpr,
    VOCABULARY: tl.constexpr,
    CAPPED: tl.constexpr,
    PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x = logits + row * (stride * PAD)
    target = tl.load(targets + row)
    if target == ignored:
        _clear(x, WIDTH, BLOCK)
    else:
        high, log, f = tl.load(logs + row), tl.load(logs + rows + row), tl.load(factor)
        at, e = target - begin, smoothing
        _logits_grad(
            x, high, log, at, f, scale, softcap, e, z_loss, WIDTH, VOCABULARY, CAPPED, BLOCK
        )


@triton.jit(do_not_specialize=["n"])
def scale_kernel(x, factor, n: tl.int64, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    """In place; reads nothing where the factor is one. n is a multiple of UNIT."""
    f = tl.load(factor)
    if f != 1.0:
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        for begin in tl.range(tl.program_id(0).to(tl.int64) * BLOCK, n, step):
            at = begin + tl.arange(0, BLOCK)
            mask = at < n // UNIT * UNIT
            value = tl.load(x + at, mask).to(tl.float32) * f
            tl.store(x + at, value.to(x.dtype.element_ty), mask)
