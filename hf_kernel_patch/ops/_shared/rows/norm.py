"""Forward and backward of the row norms: what is launched, on how many rows, with which blocks."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch

from hf_kernel_patch.ops._shared.launch import (
    Launch,
    cdiv,
    launcher,
    processors,
    programs_for,
    shared_memory,
    strides_of,
)
from hf_kernel_patch.ops._shared.rows import triton as kernels

#: The widest rows that a program holds in registers; wider ones are read twice.
WIDEST, WIDEST_BACKWARD = 32768, 8192
_WIDE_BLOCK, _WIDE_WARPS = 4096, 16
_SUM_ROWS, _SUM_BLOCK, _SUM_WARPS = 256, 32, 8
#: What stands for the kernels' parameters of strides where all rows are dense (``unit`` is 0): one
#: for the inner size, and two for each of the forward's two tensors, of the backward's three.
NO_STRIDES_FORWARD, NO_STRIDES_BACKWARD = (0,) * 5, (0,) * 7


class Blocks(NamedTuple):
    """What one program takes: rows at a time, warps, and in a loop the stages of its pipeline."""

    rows: int
    warps: int
    stages: int = 1
    #: Of programs that loop.
    programs_per_sm: int = 0


def forward_blocks(width: int) -> Blocks:
    """What a program of the forward takes, by the width of a row alone."""
    block = power(width)
    rows = max(1, 4096 // block) if block <= 1024 else 1
    return Blocks(rows, min(16, max(4, rows * block // 512)))


def backward_blocks(width: int, itemsize: int, memory: int) -> Blocks:
    """What a looping program of the backward takes, with ``memory`` bytes of shared memory.

    An element in the pipeline takes ``itemsize`` bytes.
    """
    block = power(width)
    # Rows that fill their blocks are fastest in few large programs, others in many small ones.
    full = width == block and block >= 128
    rows = max(1, (8192 if full else 2048) // block)
    warps = min(16, max(4, rows * block // 512))
    stages = max(1, min(3, 1 + memory // (rows * block * itemsize)))
    return Blocks(rows, warps, stages, max(1, 16 // warps))


def power(width: int) -> int:
    """The power of two that holds a row."""
    return 1 << (width - 1).bit_length()


class _Prepared(NamedTuple):
    """What a launch needs that does not depend on the number of rows."""

    launch: Launch
    #: Rows that a program takes at a time.
    rows: int
    #: Looping programs at most.
    programs: int
    #: In place of the pointers that the kernel does without here.
    absent: tuple[None, ...]
    #: dtypes of the output and of the sum.
    out: torch.dtype
    total: torch.dtype


@cache
def _prepare_forward(
    dtype: torch.dtype,
    weight: torch.dtype,
    other: torch.dtype | None,
    adds: bool,
    width: int,
    offset: float,
    cast_first: bool,
    unit: int = 0,
) -> _Prepared:
    total, out = dtypes(dtype, weight, other, adds, cast_first)
    offset = 0.0 if cast_first else offset
    if width > WIDEST:
        static: tuple[Any, ...] = (width, offset, cast_first, _WIDE_BLOCK)
        launch = launcher(kernels.wide_forward_kernel, static, _WIDE_WARPS)
        return _Prepared(launch, 1, 0, (), out, total)
    rows, warps, *_ = forward_blocks(width)
    static = (width, offset, cast_first, unit, rows, power(width))
    launch = launcher(
        kernels.forward_kernel, static if unit else NO_STRIDES_FORWARD + static, warps, waits=True
    )
    absent = () if adds else (None,) if other else (None, None)
    return _Prepared(launch, rows, 0, absent, out, total)


def dtypes(
    x: torch.dtype, weight: torch.dtype, other: torch.dtype | None, adds: bool, cast_first: bool
) -> tuple[torch.dtype, torch.dtype]:
    """Of the sum (or of x where nothing is added) and of the output, as in eager."""
    if other is not None and not adds:  # gated: back to x's dtype at the end
        return x, x
    total = x if other is None else torch.promote_types(x, other)
    return total, torch.promote_types(total, weight) if cast_first else total


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    other: torch.Tensor | None,
    adds: bool,
    eps: float,
    offset: float,
    cast_first: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The output and, with ``adds``, the sum; both new, with the strides of ``empty_like(x)``.

    Args:
        x: (..., H) of any strides, H up to 65536; up to 8192 where there is another.
        weight: (H,).
        other: as x: with ``adds`` what to add to x before it is normalised, else the gate.
    """
    width = x.shape[-1]
    key = x.dtype, weight.dtype, None if other is None else other.dtype, adds, width
    prepared = _prepare_forward(*key, offset, cast_first)
    out = torch.empty_like(x, dtype=prepared.out)
    total = torch.empty_like(x, dtype=prepared.total) if adds else None
    elements = x.numel()
    if not elements:
        return out, total
    flat = x.is_contiguous() and weight.is_contiguous()
    tensors: tuple[torch.Tensor, ...] = (x, weight, out)
    if other is not None:
        flat = flat and other.is_contiguous()
        tensors = (x, weight, out, other) if total is None else (x, weight, out, other, total)
    rows = elements // width
    numbers = (rows, eps) if width <= WIDEST else (eps,)
    if flat:
        prepared.launch(cdiv(rows, prepared.rows), tensors, prepared.absent + numbers)
        return out, total
    walk = strides_of(out, x, x if other is None else other) if width <= WIDEST else None
    if walk is not None and weight.is_contiguous():
        prepared = _prepare_forward(*key, offset, cast_first, walk.unit)
        prepared.launch(
            cdiv(rows, prepared.rows), tensors, prepared.absent + numbers + walk.numbers
        )
        return out, total
    dense = x.contiguous(), weight.contiguous(), None if other is None else other.contiguous()
    made, added = forward(*dense, adds, eps, offset, cast_first)
    if total is not None and added is not None:
        total.copy_(added)
    return out.copy_(made), total


@cache
def _prepare_backward(
    dtype: torch.dtype,
    grad: torch.dtype,
    weight: torch.dtype,
    other: torch.dtype | None,
    gated: bool,
    with_weight: bool,
    width: int,
    device: torch.device,
    offset: float,
    cast_first: bool,
    unit: int = 0,
) -> _Prepared:
    offset = 0.0 if cast_first else offset
    if width > WIDEST_BACKWARD:
        static: tuple[Any, ...] = (width, offset, with_weight, _WIDE_BLOCK)
        launch = launcher(kernels.wide_backward_kernel, static, _WIDE_WARPS)
        return _Prepared(launch, 1, processors(device), (), dtype, dtype)
    itemsize = sum(one.itemsize for one in (dtype, grad, other) if one)
    rows, warps, stages, programs_per_sm = backward_blocks(width, itemsize, shared_memory(device))
    static = (width, offset, cast_first, with_weight, unit, rows, power(width), stages)
    launch = launcher(
        kernels.backward_kernel, static if unit else NO_STRIDES_BACKWARD + static, warps
    )
    absent = () if gated else (None,) if other else (None, None)
    return _Prepared(launch, rows, programs_per_sm * processors(device), absent, dtype, dtype)


@cache
def _sum_launcher(dtype: torch.dtype, width: int) -> Launch:
    """Sums the programs' parts of the weight's gradient."""
    return launcher(kernels.sum_kernel, (width, _SUM_ROWS, _SUM_BLOCK), _SUM_WARPS)


def backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    other: torch.Tensor | None,
    gated: bool,
    with_weight: bool,
    eps: float,
    offset: float,
    cast_first: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of x, of the weight (None unless ``with_weight``), of the gate (if ``gated``).

    Args:
        grad: (..., H), the gradient of the normalised output.
        x: (..., H), what was normalised.
        other: as x: the gate or, unless ``gated``, what is added to the gradient of x.
    """
    width, elements = x.shape[-1], x.numel()
    grad_x, grad_weight, grad_gate = empty_gradients(x, weight, other if gated else None)
    if not elements:
        return grad_x, grad_weight.zero_() if with_weight else None, grad_gate
    inputs = [tensor for tensor in (x, grad, weight, other) if tensor is not None]
    key = x.dtype, grad.dtype, weight.dtype, None if other is None else other.dtype, gated
    options = with_weight, width, x.device, offset, cast_first
    numbers: tuple[int, ...] = ()
    unit = 0
    if not all(tensor.is_contiguous() for tensor in inputs):
        walk = strides_of(grad_x, x, grad, x if other is None else other)
        if walk is None or width > WIDEST_BACKWARD or not weight.is_contiguous():
            inputs = [tensor.contiguous() for tensor in inputs]
            x, grad, weight, other = (*inputs, None)[:4]
            made = backward(grad, x, weight, other, gated, with_weight, eps, offset, cast_first)
            if grad_gate is not None and made[2] is not None:
                grad_gate.copy_(made[2])
            return grad_x.copy_(made[0]), made[1], grad_gate
        unit, numbers = walk
    prepared = _prepare_backward(*key, *options, unit)
    rows = elements // width
    programs = programs_for(cdiv(rows, prepared.rows), prepared.programs)
    partial = grad_x  # in place of what is not needed
    if with_weight:
        make = torch.zeros if width > WIDEST_BACKWARD else torch.empty
        partial = make((programs, width), dtype=torch.float32, device=x.device)
    tensors = [*inputs[:3], grad_x, partial, *inputs[3:]]
    if grad_gate is not None:
        tensors.append(grad_gate)
    prepared.launch(programs, tensors, (*prepared.absent, rows, eps, *numbers))
    if with_weight:
        launch = _sum_launcher(weight.dtype, width)
        launch(cdiv(width, _SUM_BLOCK), (partial, grad_weight), (programs,))
    return grad_x, grad_weight if with_weight else None, grad_gate


def empty_gradients(
    x: torch.Tensor, weight: torch.Tensor, gate: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """New tensors for the gradients of x, the weight and the gate, these with x's strides."""
    grad_gate = None if gate is None else torch.empty_like(x, dtype=gate.dtype)
    return torch.empty_like(x), torch.empty_like(weight), grad_gate
