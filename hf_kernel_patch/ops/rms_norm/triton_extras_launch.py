"""Launches of the kernels of rms_norm with the arguments that few norms need."""

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
from hf_kernel_patch.ops._shared.rows.norm import (
    _SUM_BLOCK,
    NO_STRIDES_BACKWARD,
    NO_STRIDES_FORWARD,
    _sum_launcher,
    backward_blocks,
    forward_blocks,
    power,
)
from hf_kernel_patch.ops.rms_norm import triton_extras_kernels as kernels
from hf_kernel_patch.ops.rms_norm.extras import Extras

Gradients = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]


class _Prepared(NamedTuple):
    """What a launch needs that does not depend on the number of rows."""

    launch: Launch
    #: Rows that a program takes at a time.
    rows: int
    groups: int
    #: Looping programs at most, for each group.
    programs: int
    #: In place of the pointers that the kernel does without here.
    absent: tuple[None, ...]


def out_dtype(
    x: torch.dtype,
    weight: torch.dtype | None,
    gated: bool,
    cast_first: bool,
    extras: Extras,
) -> torch.dtype:
    """As in eager."""
    if weight is None or not cast_first or (gated and extras.norm_before_gate):
        return x
    return weight if extras.cast_to_weight else torch.promote_types(x, weight)


def _static(
    width: int, weighted: bool, offset: float, cast_first: bool, extras: Extras
) -> tuple[Any, ...]:
    """What both kernels know when they are compiled: group size to SILU."""
    size = extras.group_size or width
    return (
        *(size, width // size, 0.0 if cast_first or not weighted else offset, cast_first),
        *(extras.cast_to_weight, extras.cast_scale),
        *(extras.norm_before_gate, extras.activation == "silu"),
    )


@cache
def _prepare_forward(
    dtype: torch.dtype,
    weight: torch.dtype | None,
    gate: torch.dtype | None,
    width: int,
    offset: float,
    cast_first: bool,
    extras: Extras,
    unit: int = 0,
) -> _Prepared:
    size, groups, *rest = _static(width, weight is not None, offset, cast_first, extras)
    rows, warps, *_ = forward_blocks(size)
    static = (size, groups, *rest, unit, rows, power(size))
    launch = launcher(
        kernels.forward_kernel, static if unit else NO_STRIDES_FORWARD + static, warps
    )
    absent = (None,) * ((weight is None) + (gate is None))
    return _Prepared(launch, rows, groups, 0, absent)


def forward(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    gate: torch.Tensor | None,
    eps: float,
    offset: float,
    cast_first: bool,
    extras: Extras,
) -> torch.Tensor:
    """The output, new, with the strides of ``empty_like(x)``.

    Args:
        x: (..., H) of any strides, in groups of at most 8192.
        weight: (H,); there is one where there is a gate.
        gate: as x.
    """
    width = x.shape[-1]
    key = x.dtype, _dtype(weight), _dtype(gate), width, offset, cast_first, extras
    made = out_dtype(x.dtype, _dtype(weight), gate is not None, cast_first, extras)
    out = torch.empty_like(x, dtype=made)
    if not x.numel():
        return out
    prepared = _prepare_forward(*key)
    numbers: tuple[int, ...] = ()
    given = [tensor for tensor in (x, weight, gate) if tensor is not None]
    if not all(tensor.is_contiguous() for tensor in given):
        walk = strides_of(out, x, x if gate is None else gate)
        if walk is None or (weight is not None and not weight.is_contiguous()):
            x, weight, gate = x.contiguous(), _dense(weight), _dense(gate)
            return out.copy_(forward(x, weight, gate, eps, offset, cast_first, extras))
        prepared, numbers = _prepare_forward(*key, walk.unit), walk.numbers
    rows = x.numel() // width
    programs = cdiv(rows, prepared.rows) * prepared.groups
    prepared.launch(programs, [x, out, *given[1:]], (*prepared.absent, rows, eps, *numbers))
    return out


@cache
def _prepare_backward(
    dtype: torch.dtype,
    grad: torch.dtype,
    weight: torch.dtype | None,
    gate: torch.dtype | None,
    width: int,
    with_weight: bool,
    device: torch.device,
    offset: float,
    cast_first: bool,
    extras: Extras,
    unit: int = 0,
) -> _Prepared:
    size, groups, *rest = _static(width, weight is not None, offset, cast_first, extras)
    itemsize = sum(one.itemsize for one in (dtype, grad, gate) if one)
    rows, warps, stages, programs_per_sm = backward_blocks(size, itemsize, shared_memory(device))
    static = (size, groups, *rest, with_weight, unit, rows, power(size), stages)
    launch = launcher(
        kernels.backward_kernel, static if unit else NO_STRIDES_BACKWARD + static, warps
    )
    absent = (None,) * (2 * (weight is None) + 2 * (gate is None))
    programs = max(1, programs_per_sm * processors(device) // groups)
    return _Prepared(launch, rows, groups, programs, absent)


def backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    gate: torch.Tensor | None,
    with_weight: bool,
    eps: float,
    offset: float,
    cast_first: bool,
    extras: Extras,
) -> Gradients:
    """Gradients of x, of the weight (None unless ``with_weight``), of the gate (if there is one).

    ``grad`` (..., H) is that of the output.
    """
    width = x.shape[-1]
    grad_x = torch.empty_like(x)
    grad_weight = torch.empty_like(weight) if weight is not None and with_weight else None
    grad_gate = None if gate is None else torch.empty_like(x, dtype=gate.dtype)
    if not x.numel():
        return grad_x, None if grad_weight is None else grad_weight.zero_(), grad_gate
    given = [tensor for tensor in (x, grad, weight, gate) if tensor is not None]
    unit = 0
    numbers: tuple[int, ...] = ()
    if not all(tensor.is_contiguous() for tensor in given):
        walk = strides_of(grad_x, x, grad, x if gate is None else gate)
        if walk is None or (weight is not None and not weight.is_contiguous()):
            grad, x, weight, gate = grad.contiguous(), x.contiguous(), _dense(weight), _dense(gate)
            options = with_weight, eps, offset, cast_first, extras
            made = backward(grad, x, weight, gate, *options)
            if grad_gate is not None and made[2] is not None:
                grad_gate.copy_(made[2])
            return grad_x.copy_(made[0]), made[1], grad_gate
        unit, numbers = walk
    key = x.dtype, grad.dtype, _dtype(weight), _dtype(gate), width, with_weight, x.device
    prepared = _prepare_backward(*key, offset, cast_first, extras, unit)
    rows = x.numel() // width
    programs = programs_for(cdiv(rows, prepared.rows), prepared.programs)
    tensors, partial = [x, grad, grad_x], grad_x  # in place of what is not needed
    if grad_weight is not None:
        partial = torch.empty((programs, width), dtype=torch.float32, device=x.device)
    if weight is not None:
        tensors += [weight, partial]
    if gate is not None and grad_gate is not None:
        tensors += [gate, grad_gate]
    prepared.launch(programs * prepared.groups, tensors, (*prepared.absent, rows, eps, *numbers))
    if grad_weight is not None:
        add_up = _sum_launcher(grad_weight.dtype, width)
        add_up(cdiv(width, _SUM_BLOCK), (partial, grad_weight), (programs,))
    return grad_x, grad_weight, grad_gate


def _dense(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _dtype(tensor: torch.Tensor | None) -> torch.dtype | None:
    return None if tensor is None else tensor.dtype
