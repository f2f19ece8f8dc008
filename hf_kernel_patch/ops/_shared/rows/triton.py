"""The Triton kernels of rms_norm, also gated, and add_rms_norm.

One read and one write each way: many short rows or one long row to a program, held in registers.
Arithmetic is in float32 throughout. Nothing compiled depends on the number of rows.

Forward, for each row x of H elements:
  1. add the residual, rounded to the sum's dtype, and store the sum (add_rms_norm alone);
  2. rstd = 1 / sqrt(mean(x^2) + eps);
  3. y = x rstd w, rounded where the original rounds;
  4. times silu(gate), where there is a gate.
Backward, with g = dy w, for each row:
  1. rstd again: reading x is cheaper than having kept what was made of it;
  2. with a gate: its gradient, and dy times silu(gate);
  3. dx = rstd (g - x rstd mean(g x rstd)), plus the gradient of the sum (add_rms_norm alone);
  4. dw += dy x rstd, in registers, over the rows that the program loops over;
  5. a second kernel adds up the programs' parts of dw.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import triton
import triton.language as tl

from hf_kernel_patch.ops._shared.triton_early import begin

_NUMBERS = ["rows", "eps", "inner", "x_outer", "x_step", "y_outer", "y_step", "z_outer", "z_step"]


@triton.jit
def _offsets(row, cols, inner, outer, step, WIDTH: tl.constexpr, UNIT: tl.constexpr):
    """Offsets of a block of rows: UNIT 0 is for dense rows, else strides are in units of UNIT."""
    if UNIT == 0:
        start = row * WIDTH
    else:
        start = (row // inner) * (outer * UNIT) + (row % inner) * (step * UNIT)
    return start[:, None] + cols[None, :]


@triton.jit
def _scaled(normed, w, dtype: tl.constexpr, weight_dtype: tl.constexpr, CAST_FIRST: tl.constexpr):
    """The normalised rows times the weight, rounded where the original rounds; float32."""
    if CAST_FIRST:
        y = w * normed.to(dtype).to(tl.float32)
        if dtype == weight_dtype:
            y = y.to(dtype).to(tl.float32)
    else:
        y = (normed * w).to(dtype).to(tl.float32)
    return y


@triton.jit(do_not_specialize=_NUMBERS[:7])
def forward_kernel(
    x,  # (rows, WIDTH)
    weight,  # (WIDTH,)
    out,  # (rows, WIDTH), dense
    other,  # (rows, WIDTH): with a total the residual to add to x, without the gate; or None
    total,  # (rows, WIDTH), dense: x + other, or None
    rows: tl.int64,
    eps: tl.float32,
    inner: tl.int64,
    x_outer: tl.int64,
    x_step: tl.int64,
    y_outer: tl.int64,  # of other
    y_step: tl.int64,
    WIDTH: tl.constexpr,
    OFFSET: tl.constexpr,
    CAST_FIRST: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    begin(EARLY)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (cols < WIDTH)[None, :]
    at = row[:, None] * WIDTH + cols[None, :]
    x_at = _offsets(row, cols, inner, x_outer, x_step, WIDTH, UNIT)
    wide = tl.load(x + x_at, mask, 0.0).to(tl.float32)
    w = tl.load(weight + cols, cols < WIDTH, 0.0).to(tl.float32)[None, :] + OFFSET
    # What the norm is of: the sum is rounded to its dtype before it is normalised, as in eager.
    dtype: tl.constexpr = x.dtype.element_ty if total is None else total.dtype.element_ty
    if other is not None:
        y_at = _offsets(row, cols, inner, y_outer, y_step, WIDTH, UNIT)
        second = tl.load(other + y_at, mask, 0.0).to(tl.float32)
    if total is not None:
        wide = (wide + second).to(dtype)
        tl.store(total + at, wide, mask)
        wide = wide.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(wide * wide, 1) / WIDTH + eps)
    y = _scaled(wide * rstd[:, None], w, dtype, weight.dtype.element_ty, CAST_FIRST)
    if other is not None and total is None:
        y = y * (second * tl.sigmoid(second))
    tl.store(out + at, y.to(out.dtype.element_ty), mask)


@triton.jit(do_not_specialize=_NUMBERS)
def backward_kernel(
    x,  # (rows, WIDTH)
    grad,  # (rows, WIDTH)
    weight,  # (WIDTH,)
    grad_x,  # (rows, WIDTH), dense
    partial,  # (programs, WIDTH) float32: each program's part of the weight's gradient
    other,  # (rows, WIDTH): with a grad_gate the gate, without what to add to grad_x; or None
    grad_gate,  # (rows, WIDTH), dense, or None
    rows: tl.int64,
    eps: tl.float32,
    inner: tl.int64,
    x_outer: tl.int64,
    x_step: tl.int64,
    y_outer: tl.int64,  # of grad
    y_step: tl.int64,
    z_outer: tl.int64,  # of other
    z_step: tl.int64,
    WIDTH: tl.constexpr,
    OFFSET: tl.constexpr,
    CAST_FIRST: tl.constexpr,
    WITH_WEIGHT: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    cols = tl.arange(0, BLOCK)
    w = tl.load(weight + cols, cols < WIDTH, 0.0).to(tl.float32)[None, :] + OFFSET
    # One sum for each place of the tile, added up over its rows after the loop: adding over rows
    # inside of it would cost a reduction across warps for each block.
    partial_dw = tl.zeros([ROWS, BLOCK], tl.float32)
    # As few programs as fill the device, each looping, since each leaves a part of dw to add up.
    # With more stages the loads of the next blocks are in flight meanwhile.
    first, last = tl.program_id(0), tl.cdiv(rows, ROWS)
    for block in tl.range(first, last, tl.num_programs(0), num_stages=STAGES):
        row = block * ROWS + tl.arange(0, ROWS).to(tl.int64)
        mask = (row < rows)[:, None] & (cols < WIDTH)[None, :]
        at = row[:, None] * WIDTH + cols[None, :]
        x_at = _offsets(row, cols, inner, x_outer, x_step, WIDTH, UNIT)
        y_at = _offsets(row, cols, inner, y_outer, y_step, WIDTH, UNIT)
        wide = tl.load(x + x_at, mask, 0.0).to(tl.float32)
        g = tl.load(grad + y_at, mask, 0.0).to(tl.float32)
        if other is not None:
            z_at = _offsets(row, cols, inner, z_outer, z_step, WIDTH, UNIT)
            z = tl.load(other + z_at, mask, 0.0).to(tl.float32)
        rstd = tl.rsqrt(tl.sum(wide * wide, 1) / WIDTH + eps)
        rstd = tl.where(row < rows, rstd, 0.0)[:, None]  # without eps it is inf where no row is
        normed = wide * rstd
        if grad_gate is not None:
            sigmoid = tl.sigmoid(z)
            y = _scaled(normed, w, x.dtype.element_ty, weight.dtype.element_ty, CAST_FIRST)
            dz = g * y * (sigmoid * (1.0 + z * (1.0 - sigmoid)))
            tl.store(grad_gate + at, dz.to(grad_gate.dtype.element_ty), mask)
            g = g * (z * sigmoid)
        mean = tl.sum(g * w * wide, 1)[:, None] * rstd / WIDTH
        dx = rstd * (g * w - normed * mean)
        if other is not None and grad_gate is None:
            dx += z
        if WITH_WEIGHT:
            partial_dw += g * normed
        tl.store(grad_x + at, dx.to(grad_x.dtype.element_ty), mask)
    if WITH_WEIGHT:
        tl.store(partial + first.to(tl.int64) * WIDTH + cols, tl.sum(partial_dw, 0), cols < WIDTH)


@triton.jit(do_not_specialize=["eps"])
def wide_forward_kernel(
    x,
    weight,
    out,
    eps: tl.float32,
    WIDTH: tl.constexpr,
    OFFSET: tl.constexpr,
    CAST_FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One dense row a program, read twice: it is too wide for registers."""
    x += tl.program_id(0).to(tl.int64) * WIDTH
    out += tl.program_id(0).to(tl.int64) * WIDTH
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, WIDTH, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        wide = tl.load(x + cols, cols < WIDTH, 0.0).to(tl.float32)
        squares += wide * wide
    rstd = tl.rsqrt(tl.sum(squares, 0) / WIDTH + eps)
    for start in range(0, WIDTH, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        wide = tl.load(x + cols, cols < WIDTH, 0.0).to(tl.float32)
        w = tl.load(weight + cols, cols < WIDTH, 0.0).to(tl.float32) + OFFSET
        y = _scaled(wide * rstd, w, x.dtype.element_ty, weight.dtype.element_ty, CAST_FIRST)
        tl.store(out + cols, y.to(out.dtype.element_ty), cols < WIDTH)


@triton.jit(do_not_specialize=["rows", "eps"])
def wide_backward_kernel(
    x,
    grad,
    weight,
    grad_x,
    partial,  # (programs, WIDTH) float32, zeros
    rows: tl.int64,
    eps: tl.float32,
    WIDTH: tl.constexpr,
    OFFSET: tl.constexpr,
    WITH_WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Dense rows, read twice; the parts of the weight's gradient are kept in ``partial``."""
    first = tl.program_id(0).to(tl.int64)
    for row in range(first, rows, tl.num_programs(0)):
        at = row * WIDTH
        # Both sums in one pass: mean(g x rstd) needs rstd only as a factor.
        squares = tl.zeros([BLOCK], tl.float32)
        products = tl.zeros([BLOCK], tl.float32)
        for start in range(0, WIDTH, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            wide = tl.load(x + at + cols, cols < WIDTH, 0.0).to(tl.float32)
            g = tl.load(grad + at + cols, cols < WIDTH, 0.0).to(tl.float32)
            w = tl.load(weight + cols, cols < WIDTH, 0.0).to(tl.float32) + OFFSET
            squares += wide * wide
            products += g * w * wide
        rstd = tl.rsqrt(tl.sum(squares, 0) / WIDTH + eps)
        mean = tl.sum(products, 0) * rstd / WIDTH
        for start in range(0, WIDTH, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            normed = tl.load(x + at + cols, cols < WIDTH, 0.0).to(tl.float32) * rstd
            g = tl.load(grad + at + cols, cols < WIDTH, 0.0).to(tl.float32)
            w = tl.load(weight + cols, cols < WIDTH, 0.0).to(tl.float32) + OFFSET
            dx = rstd * (g * w - normed * mean)
            tl.store(grad_x + at + cols, dx.to(grad_x.dtype.element_ty), cols < WIDTH)
            if WITH_WEIGHT:  # in memory, as the row is; no other program has this part
                mine = partial + first * WIDTH + cols
                tl.store(mine, tl.load(mine, cols < WIDTH, 0.0) + g * normed, cols < WIDTH)


@triton.jit(do_not_specialize=["programs"])
def sum_kernel(
    partial,  # (programs, WIDTH) float32
    out,  # (WIDTH,)
    programs: tl.int64,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums of columns, in an order that depends on the shape alone.

    Without atomics, so that gradients are the same bits each time.
    """
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, programs, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < programs)[:, None] & (cols < WIDTH)[None, :]
        total += tl.load(partial + row[:, None] * WIDTH + cols[None, :], mask, 0.0)
    tl.store(out + cols, tl.sum(total, 0).to(out.dtype.element_ty), cols < WIDTH)
