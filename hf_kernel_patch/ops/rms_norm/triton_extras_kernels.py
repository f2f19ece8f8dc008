"""The Triton kernels of rms_norm by groups, without a weight, and with other gates.

One read and one write each way, a few groups to a program, held in registers. Arithmetic is in
float32 throughout. Nothing compiled depends on the number of rows.

The steps are those of ``rows/triton.py`` with a group in place of a row, and
  * a gate that is applied before the norm: x silu(gate) takes the place of x, and the gradient of
    that product goes to both;
  * rstd rounded to x's dtype before it is used (CAST_SCALE);
  * no weight: the norm is only rounded.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import triton
import triton.language as tl

from hf_kernel_patch.ops._shared.rows.triton import _offsets

_NUMBERS = ["rows", "eps", "inner", "x_outer", "x_step", "y_outer", "y_step", "z_outer", "z_step"]


@triton.jit
def _activated(z, SILU: tl.constexpr):
    """silu(z), or its sigmoid."""
    y = tl.sigmoid(z)
    if SILU:
        y = z * y
    return y


@triton.jit
def _slope(z, SILU: tl.constexpr):
    """The derivative of ``_activated``."""
    sigmoid = tl.sigmoid(z)
    y = sigmoid * (1.0 - sigmoid)
    if SILU:
        y = sigmoid + z * y
    return y


@triton.jit
def _scaled(normed, w, dtype: tl.constexpr, weight_dtype: tl.constexpr, CAST_FIRST: tl.constexpr):
    """The normalised rows times the weight, rounded as before a gate; float32."""
    if CAST_FIRST:
        y = w * normed.to(dtype).to(tl.float32)
        if dtype == weight_dtype:
            y = y.to(dtype).to(tl.float32)
    else:
        y = normed * w
    return y


@triton.jit(do_not_specialize=_NUMBERS[:7])
def forward_kernel(
    x,  # (rows, GROUPS * WIDTH)
    out,  # (rows, GROUPS * WIDTH), dense
    weight,  # (GROUPS * WIDTH,) or None
    gate,  # (rows, GROUPS * WIDTH) or None
    rows: tl.int64,
    eps: tl.float32,
    inner: tl.int64,
    x_outer: tl.int64,
    x_step: tl.int64,
    y_outer: tl.int64,  # of the gate
    y_step: tl.int64,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    OFFSET: tl.constexpr,
    CAST_FIRST: tl.constexpr,
    CAST_TO_WEIGHT: tl.constexpr,
    CAST_SCALE: tl.constexpr,
    NORM_FIRST: tl.constexpr,
    SILU: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program takes one group of ROWS rows; its neighbours the other groups of the same rows."""
    program = tl.program_id(0).to(tl.int64)
    row = (program // GROUPS) * ROWS + tl.arange(0, ROWS)
    inside = tl.arange(0, BLOCK) < WIDTH
    cols = (program % GROUPS) * WIDTH + tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & inside[None, :]
    at = row[:, None] * (GROUPS * WIDTH) + cols[None, :]
    x_at = _offsets(row, cols, inner, x_outer, x_step, GROUPS * WIDTH, UNIT)
    wide = tl.load(x + x_at, mask, 0.0).to(tl.float32)
    if gate is not None:
        z_at = _offsets(row, cols, inner, y_outer, y_step, GROUPS * WIDTH, UNIT)
        factor = _activated(tl.load(gate + z_at, mask, 0.0).to(tl.float32), SILU)
        if not NORM_FIRST:
            wide *= factor
    rstd = tl.rsqrt(tl.sum(wide * wide, 1) / WIDTH + eps)
    if CAST_SCALE:
        rstd = rstd.to(x.dtype.element_ty).to(tl.float32)
    y = wide * rstd[:, None]
    if weight is not None:
        weight_dtype: tl.constexpr = weight.dtype.element_ty
        dtype: tl.constexpr = weight_dtype if CAST_TO_WEIGHT else x.dtype.element_ty
        w = tl.load(weight + cols, inside, 0.0).to(tl.float32)[None, :] + OFFSET
        y = _scaled(y, w, dtype, weight_dtype, CAST_FIRST)
    if gate is not None and NORM_FIRST:
        y *= factor
    tl.store(out + at, y.to(out.dtype.element_ty), mask)


@triton.jit(do_not_specialize=_NUMBERS)
def backward_kernel(
    x,  # (rows, GROUPS * WIDTH)
    grad,  # (rows, GROUPS * WIDTH)
    grad_x,  # (rows, GROUPS * WIDTH), dense
    weight,  # (GROUPS * WIDTH,) or None
    partial,  # (programs, GROUPS * WIDTH) float32: parts of the weight's gradient; or None
    gate,  # (rows, GROUPS * WIDTH) or None
    grad_gate,  # (rows, GROUPS * WIDTH), dense, or None
    rows: tl.int64,
    eps: tl.float32,
    inner: tl.int64,
    x_outer: tl.int64,
    x_step: tl.int64,
    y_outer: tl.int64,  # of grad
    y_step: tl.int64,
    z_outer: tl.int64,  # of the gate
    z_step: tl.int64,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    OFFSET: tl.constexpr,
    CAST_FIRST: tl.constexpr,
    CAST_TO_WEIGHT: tl.constexpr,
    CAST_SCALE: tl.constexpr,
    NORM_FIRST: tl.constexpr,
    SILU: tl.constexpr,
    WITH_WEIGHT: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A looping program takes one group of every so many rows.

    It stays with its group, so that weight and dw are in its registers from end to end.
    """
    group, first = tl.program_id(0) % GROUPS, tl.program_id(0) // GROUPS
    inside = tl.arange(0, BLOCK) < WIDTH
    cols = group.to(tl.int64) * WIDTH + tl.arange(0, BLOCK)
    w = 1.0
    if weight is not None:
        weight_dtype: tl.constexpr = weight.dtype.element_ty
        dtype: tl.constexpr = weight_dtype if CAST_TO_WEIGHT else x.dtype.element_ty
        w = tl.load(weight + cols, inside, 0.0).to(tl.float32)[None, :] + OFFSET
    partial_dw = tl.zeros([ROWS, BLOCK], tl.float32)
    last, step = tl.cdiv(rows, ROWS), tl.num_programs(0) // GROUPS
    for block in tl.range(first, last, step, num_stages=STAGES):
        row = block * ROWS + tl.arange(0, ROWS).to(tl.int64)
        mask = (row < rows)[:, None] & inside[None, :]
        at = row[:, None] * (GROUPS * WIDTH) + cols[None, :]
        x_at = _offsets(row, cols, inner, x_outer, x_step, GROUPS * WIDTH, UNIT)
        y_at = _offsets(row, cols, inner, y_outer, y_step, GROUPS * WIDTH, UNIT)
        own = tl.load(x + x_at, mask, 0.0).to(tl.float32)
        g = tl.load(grad + y_at, mask, 0.0).to(tl.float32)
        wide = own
        if gate is not None:
            z_at = _offsets(row, cols, inner, z_outer, z_step, GROUPS * WIDTH, UNIT)
            z = tl.load(gate + z_at, mask, 0.0).to(tl.float32)
            factor = _activated(z, SILU)
            if not NORM_FIRST:
                wide = own * factor
        rstd = tl.rsqrt(tl.sum(wide * wide, 1) / WIDTH + eps)
        if CAST_SCALE:
            rstd = rstd.to(x.dtype.element_ty).to(tl.float32)
        rstd = tl.where(row < rows, rstd, 0.0)[:, None]  # without eps it is inf where no row is
        normed = wide * rstd
        if gate is not None and NORM_FIRST:
            dz = g * _scaled(normed, w, dtype, weight_dtype, CAST_FIRST) * _slope(z, SILU)
            tl.store(grad_gate + at, dz.to(grad_gate.dtype.element_ty), mask)
            g *= factor
        mean = tl.sum(g * w * wide, 1)[:, None] * rstd / WIDTH
        dx = rstd * (g * w - normed * mean)
        if gate is not None and not NORM_FIRST:
            dz = dx * own * _slope(z, SILU)
            tl.store(grad_gate + at, dz.to(grad_gate.dtype.element_ty), mask)
            dx *= factor
        if WITH_WEIGHT:
            partial_dw += g * normed
        tl.store(grad_x + at, dx.to(grad_x.dtype.element_ty), mask)
    if WITH_WEIGHT:
        partial_at = first.to(tl.int64) * (GROUPS * WIDTH) + cols
        tl.store(partial + partial_at, tl.sum(partial_dw, 0), inside)
