"""swiglu through torch_npu's npu_swiglu and npu_swiglu_backward."""

# npu_swiglu over silu and a product: one operator instead of two, and of three backward; its
# input is one contiguous tensor, which two projections have to be copied into.

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch_npu

from hf_kernel_patch.ops._shared.autograd import Gradients, Tensors, differentiable
from hf_kernel_patch.ops.swiglu import reference

if TYPE_CHECKING:
    from torch.autograd.function import FunctionCtx


def swiglu(gate: torch.Tensor, up: torch.Tensor, activation: str = "silu") -> torch.Tensor:
    """As :func:`hf_kernel_patch.ops.swiglu.reference.swiglu`, for silu."""
    tracked = torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad)
    if not _are_halves(gate, up):
        joined = torch.cat((gate, up), dim=-1)
    else:
        joined = _Joined.apply(gate, up) if tracked else _joined(gate)
    return _swiglu((joined,), ())


def _are_halves(gate: torch.Tensor, up: torch.Tensor) -> bool:
    """Whether gate and up are the two halves of every row of a contiguous tensor."""
    return (
        gate.untyped_storage().data_ptr() == up.untyped_storage().data_ptr()
        and gate.storage_offset() + gate.shape[-1] == up.storage_offset()
        and gate.stride() == up.stride()
        and _joined(gate).is_contiguous()
    )


def _joined(gate: torch.Tensor) -> torch.Tensor:
    """(..., 2I): gate and the other half of every row, without a copy."""
    return gate.as_strided((*gate.shape[:-1], 2 * gate.shape[-1]), gate.stride())


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return _joined(gate)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return grad.chunk(2, dim=-1)


def _forward(tensors: Tensors, options: tuple[Any, ...]) -> tuple[torch.Tensor, Tensors]:
    return torch_npu.npu_swiglu(*tensors), ()


def _backward(
    grad: torch.Tensor,
    tensors: Tensors,
    kept: Tensors,
    options: tuple[Any, ...],
    needed: tuple[bool, ...],
) -> Gradients:
    return (torch_npu.npu_swiglu_backward(grad.contiguous(), *tensors),)


def _plain(tensors: Tensors, options: tuple[Any, ...]) -> torch.Tensor:
    return reference.swiglu(*tensors[0].chunk(2, dim=-1))


_swiglu = differentiable(_forward, _backward, _plain)
