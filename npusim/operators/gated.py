"""Gated activations over a tensor that holds both halves, and GELU alone."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from . import operator
from .limit import FLOATS, Limit

SWIGLU_DTYPE = Limit(
    "npu_swiglu", "the input is float16, bfloat16 or float32", "dtype支持FP32、FP16或BF16类型"
)
SWIGLU_RANK = Limit("npu_swiglu", "the input has 1 to 8 dimensions", "shape支持1-8维")
SWIGLU_EVEN = Limit(
    "npu_swiglu",
    "the size of the split dimension is even",
    "the value of shape must be an even number in the dimension corresponding to dim",
    page="aclnnSwiGlu, x",
)
SWIGLU_CONTIGUOUS = Limit(
    "npu_swiglu",
    "the input is contiguous",
    "Non-contiguous Tensor: no",
    page="aclnnSwiGlu, x",
)
SWIGLU_GRAD_CONTIGUOUS = Limit(
    "npu_swiglu_backward",
    "the output's gradient is contiguous",
    "Non-contiguous Tensor: no",
    page="aclnnSwiGluGrad, yGrad",
)
SWIGLU_GRAD_EMPTY = Limit(
    "npu_swiglu_backward",
    "the output's gradient has elements",
    "Empty tensors are not supported",
    page="aclnnSwiGluGrad, yGrad",
)
GEGLU_DTYPE = Limit(
    "npu_geglu",
    "the input is float16, bfloat16 or float32",
    "支持FLOAT32、FLOAT16、BFLOAT16",
)
GEGLU_APPROXIMATE = Limit("npu_geglu", "approximate is 0 (erf) or 1 (tanh)", "0表示使用none")
GEGLU_EVEN = Limit(
    "npu_geglu",
    "the size of the split dimension is even",
    "out、outGelu在dim维的size等于self在dim维size的1/2",
)


def _even(tensor: torch.Tensor, dim: int) -> bool:
    return -tensor.dim() <= dim < tensor.dim() and tensor.shape[dim] % 2 == 0


def _swiglu_limits(input: torch.Tensor, dim: int) -> None:
    SWIGLU_DTYPE.require(input.dtype in FLOATS)
    SWIGLU_RANK.require(1 <= input.dim() <= 8)
    SWIGLU_EVEN.require(_even(input, dim))
    SWIGLU_CONTIGUOUS.require(input.is_contiguous())


def _swiglu_grad_limits(grad_output: torch.Tensor, input: torch.Tensor, dim: int) -> None:
    SWIGLU_GRAD_CONTIGUOUS.require(grad_output.is_contiguous())
    SWIGLU_GRAD_EMPTY.require(grad_output.numel() > 0)


def _geglu_limits(input: torch.Tensor, dim: int, approximate: int, activate_left: bool) -> None:
    GEGLU_DTYPE.require(input.dtype in FLOATS)
    GEGLU_APPROXIMATE.require(approximate in (0, 1))
    GEGLU_EVEN.require(_even(input, dim))


@operator("npu_swiglu", limits=_swiglu_limits)
def swiglu(input: torch.Tensor, dim: int) -> torch.Tensor:
    """silu of the first half along ``dim``, times the second."""
    gate, up = input.float().chunk(2, dim)
    return (F.silu(gate) * up).to(input.dtype)


@operator("npu_swiglu_backward", limits=_swiglu_grad_limits)
def swiglu_backward(grad_output: torch.Tensor, input: torch.Tensor, dim: int) -> torch.Tensor:
    gate, up = input.float().chunk(2, dim)
    grad, sigmoid = grad_output.float(), torch.sigmoid(gate)
    to_gate = grad * up * sigmoid * (1 + gate * (1 - sigmoid))
    return torch.cat([to_gate, grad * gate * sigmoid], dim).to(input.dtype)


def _names(approximate: int) -> str:
    return "tanh" if approximate else "none"


@operator("npu_geglu", limits=_geglu_limits)
def geglu(
    input: torch.Tensor, dim: int, approximate: int, activate_left: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """One half along ``dim`` times gelu of the other (the right one, by default), and that gelu."""
    left, right = input.float().chunk(2, dim)
    linear, activated = (right, left) if activate_left else (left, right)
    gelu = F.gelu(activated, approximate=_names(approximate))
    return (linear * gelu).to(input.dtype), gelu.to(input.dtype)


@operator("npu_geglu_grad")
def geglu_grad(
    grad_output: torch.Tensor,
    input: torch.Tensor,
    gelu: torch.Tensor,
    dim: int,
    approximate: int,
    activate_left: bool,
) -> torch.Tensor:
    left, right = input.float().chunk(2, dim)
    linear, activated = (right, left) if activate_left else (left, right)
    grad = grad_output.float()
    to_activated = torch.ops.aten.gelu_backward(
        grad * linear, activated, approximate=_names(approximate)
    )
    halves = [grad * gelu.float(), to_activated]
    return torch.cat(halves[::-1] if activate_left else halves, dim).to(input.dtype)


@operator("npu_gelu")
def gelu(input: torch.Tensor, approximate: str) -> torch.Tensor:
    return F.gelu(input.float(), approximate=approximate).to(input.dtype)


@operator("npu_gelu_backward")
def gelu_backward(grad_output: torch.Tensor, input: torch.Tensor, approximate: str) -> torch.Tensor:
    grad = torch.ops.aten.gelu_backward(grad_output.float(), input.float(), approximate=approximate)
    return grad.to(input.dtype)
