"""swiglu in Triton: elementwise over all elements, whatever the rows; the backward recomputes.

Forward: 1. load gate and up; 2. activate the gate in float32, rounded as the original rounds it;
3. store the product.
Backward: 1. load the gradient, gate and up; 2. the activation and its derivative again, which are
cheaper to compute than to read; 3. store both gradients.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch.overrides import handle_torch_function, has_torch_function_variadic

from hf_kernel_patch.ops._shared.fused import Backward, fused_op
from hf_kernel_patch.ops._shared.launch import Launch, cdiv, launcher
from hf_kernel_patch.ops.swiglu import reference
from hf_kernel_patch.ops.swiglu.reference import activate

#: Elements that one program takes, and its warps.
BLOCK = 2048
WARPS = 4
#: Up to so many elements PyTorch's two launches cost less of the host than one of Triton's.
SMALL = 1 << 20
#: The activations as the kernels know them.
CODES = {"gelu_tanh": 0, "silu": 1, "gelu": 2}


@triton.jit
def _normal_cdf(x):
    """The distribution function of the normal distribution, precise where it is small, too.

    Beyond one it is that of erfc in Numerical Recipes (Press et al., 3rd edition, 6.2.2).
    """
    z = tl.abs(x) * 0.7071067811865476
    t = 1.0 / (1.0 + 0.5 * z)
    p = -0.82215223 + t * 0.17087277
    p = 0.27886807 + t * (-1.13520398 + t * (1.48851587 + t * p))
    p = 1.00002368 + t * (0.37409196 + t * (0.09678418 + t * (-0.18628806 + t * p)))
    tail = 0.5 * t * tl.exp(-z * z - 1.26551223 + t * p)
    far = tl.where(x < 0.0, tail, 1.0 - tail)
    return tl.where(z < 0.7071067811865476, 0.5 + 0.5 * tl.erf(x * 0.7071067811865476), far)


@triton.jit
def value_and_slope(gate, ACTIVATION: tl.constexpr):
    """The activation of a code and its derivative, in float32.

    silu is gate s(gate), s the logistic function; gelu is gate times the normal distribution's
    function, and its tanh form, 0.5 gate (1 + tanh(u)), is gate s(2 u).
    """
    if ACTIVATION == 1:
        d = 1.0 + tl.exp(-gate)
        s = 1.0 / d
        return gate / d, s * (1.0 + gate * (1.0 - s))
    elif ACTIVATION == 2:
        cdf = _normal_cdf(gate)
        return gate * cdf, cdf + gate * (0.3989422804014327 * tl.exp(-0.5 * gate * gate))
    else:
        square = gate * gate
        z = gate * (1.5957691216057308 + 0.07135481627260025 * square)
        e = tl.exp(-tl.abs(z))
        near, far = 1.0 / (1.0 + e), e / (1.0 + e)  # s(|z|) and 1 - s(|z|), without cancellation
        s = tl.where(z < 0.0, far, near)
        slope = 1.5957691216057308 + 0.21406444881780076 * square
        return gate * s, s + gate * near * far * slope


@triton.jit
def _elements_of(n, BLOCK: tl.constexpr, UNIT: tl.constexpr):
    """A program's first element, its elements after that, and which of them there are."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    return start, i, start + i < n // UNIT * UNIT


@triton.jit
def _offsets(start, i, row_stride, WIDTH: tl.constexpr, UNIT: tl.constexpr):
    """Where these elements of rows of WIDTH lie; WIDTH 0 is for a dense tensor.

    Rows have strides where gate and up are the halves of one projection. The division in 64 bits is
    once a program; what is left of it an element fits 32 bits.
    """
    if WIDTH == 0:
        return start + i
    else:
        row = start // WIDTH
        column = (start - row * WIDTH).to(tl.int32) + i
        row_stride = row_stride // UNIT * UNIT  # no change, but Triton sees a multiple of UNIT
        return (row + column // WIDTH) * row_stride + column % WIDTH


@triton.jit(do_not_specialize=["n", "gate_row", "up_row"])
def _forward_kernel(
    gate,  # (rows, WIDTH) by row strides
    up,
    out,  # (rows, WIDTH), dense
    n: tl.int64,  # elements; a multiple of UNIT, as the strides of rows are
    gate_row: tl.int64,
    up_row: tl.int64,
    WIDTH: tl.constexpr,
    UNIT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start, i, mask = _elements_of(n, BLOCK, UNIT)
    g = tl.load(gate + _offsets(start, i, gate_row, WIDTH, UNIT), mask).to(tl.float32)
    u = tl.load(up + _offsets(start, i, up_row, WIDTH, UNIT), mask).to(tl.float32)
    activated, _ = value_and_slope(g, ACTIVATION)
    activated = activated.to(gate.dtype.element_ty).to(tl.float32)  # as the original rounds it
    tl.store(out + start + i, (activated * u).to(out.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["n", "grad_row", "gate_row", "up_row"])
def _backward_kernel(
    grad,  # (rows, WIDTH) by row strides
    gate,
    up,
    grad_gate,  # (rows, WIDTH), dense
    grad_up,
    n: tl.int64,  # elements; a multiple of UNIT, as the strides of rows are
    grad_row: tl.int64,
    gate_row: tl.int64,
    up_row: tl.int64,
    WIDTH: tl.constexpr,
    UNIT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start, i, mask = _elements_of(n, BLOCK, UNIT)
    d = tl.load(grad + _offsets(start, i, grad_row, WIDTH, UNIT), mask).to(tl.float32)
    g = tl.load(gate + _offsets(start, i, gate_row, WIDTH, UNIT), mask).to(tl.float32)
    u = tl.load(up + _offsets(start, i, up_row, WIDTH, UNIT), mask).to(tl.float32)
    activated, slope = value_and_slope(g, ACTIVATION)
    tl.store(grad_gate + start + i, (d * u * slope).to(grad_gate.dtype.element_ty), mask)
    tl.store(grad_up + start + i, (d * activated).to(grad_up.dtype.element_ty), mask)


def _row_stride(x: torch.Tensor) -> int | None:
    """How far apart the rows (last dimension) of x are; None where they are not rows."""
    if x.stride(-1) != 1:
        return None
    found, size = None, 1
    for length, stride in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1])):
        if length == 1:
            continue
        found = stride if found is None else found
        if stride != found * size:
            return None
        size *= length
    return x.shape[-1] if found is None else found


def _rows(*tensors: torch.Tensor) -> tuple[list[torch.Tensor], int, list[int]]:
    """Tensors of one shape as kernels read them: perhaps copies, WIDTH, strides of rows."""
    if all(tensor.is_contiguous() for tensor in tensors):
        return list(tensors), 0, [0] * len(tensors)
    plain, found = [], []
    for tensor in tensors:
        stride = _row_stride(tensor)
        if stride is None:
            tensor, stride = tensor.contiguous(), tensor.shape[-1]
        plain.append(tensor)
        found.append(stride)
    return plain, tensors[0].shape[-1], found


@cache
def _launcher(kernel: Any, dtypes: tuple[torch.dtype, ...], *static: Any) -> Launch:
    """The launcher for tensors of these dtypes."""
    return launcher(kernel, (*static, BLOCK), WARPS)


def _launch(
    kernel: Any, inputs: tuple[torch.Tensor, ...], outputs: tuple[torch.Tensor, ...], code: int
) -> None:
    n = outputs[0].numel()
    if not n:
        return
    plain, width, row_strides = _rows(*inputs)
    bits = n
    for stride in row_strides:
        bits |= stride
    static = width, 1 if bits & 7 else 8, code
    launch = _launcher(kernel, (inputs[0].dtype, inputs[-1].dtype), *static)
    launch(cdiv(n, BLOCK), (*plain, *outputs), (n, *row_strides))


def _forward(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    _launch(_forward_kernel, (gate, up), (out,), CODES[activation])
    return out


def _backward(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str, needed: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    found = _gradients(gate, up)
    _launch(_backward_kernel, (grad, gate, up), found, CODES[activation])
    return found


def _gradients(gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """New tensors for the gradients."""
    options = {"dtype": gate.dtype, "device": gate.device}
    return torch.empty(gate.shape, **options), torch.empty(up.shape, **options)


_INPUTS = "Tensor gate, Tensor up, str activation"
_operator, _apply = fused_op(
    "swiglu",
    f"({_INPUTS}) -> Tensor",
    _forward,
    lambda gate, up, activation: _gradients(gate, up)[0],
    Backward(
        f"(Tensor grad, {_INPUTS}, bool[] needed) -> (Tensor, Tensor)",
        _backward,
        lambda grad, gate, up, activation, needed: _gradients(gate, up),
        reference.swiglu,
    ),
)


def swiglu(gate: torch.Tensor, up: torch.Tensor, activation: str = "silu") -> torch.Tensor:
    """As :func:`hf_kernel_patch.ops.swiglu.reference.swiglu`, rounding where the original does.

    For few elements and without gradients PyTorch's own kernels compute the same sooner.
    """
    if torch.compiler.is_compiling():
        return _operator(gate, up, activation)
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        return _apply((activation,), gate, up)
    if has_torch_function_variadic(gate, up):  # as where a decoded token's products are noted
        return handle_torch_function(swiglu, (gate, up), gate, up, activation)
    if gate.numel() <= SMALL:
        return activate(gate, activation).mul_(up)
    return _forward(gate, up, activation)
