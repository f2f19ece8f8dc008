"""swiglu through torch_npu's npu_swiglu and npu_swiglu_backward."""

# npu_swiglu over silu and a product: one operator instead of two, and of three backward; its
# input is one contiguous tensor, which two projections have to be copied into.

from __future__ import annotations

from typing import Any

import torch
import torch_npu

from hf_kernel_patch.ops.autograd import eager_gradients
from hf_kernel_patch.ops.swiglu import reference


def swiglu(gate: torch.Tensor, up: torch.Tensor, activation: str = "silu") -> torch.Tensor:
    """As :func:`hf_kernel_patch.ops.swiglu.reference.swiglu`, for silu."""
    tracked = torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad)
    if not _are_halves(gate, up):
        joined = torch.cat((gate, up), dim=-1)
    else:
        joined = _Joined.apply(gate, up) if tracked else _joined(gate)
    return _SwiGLU.apply(joined) if tracked else torch_npu.npu_swiglu(joined)


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
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return _joined(gate)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return grad.chunk(2, dim=-1)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, joined: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(joined)
        return torch_npu.npu_swiglu(joined)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        (joined,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            return eager_gradients(
                lambda whole: reference.swiglu(*whole.chunk(2, dim=-1)), (joined,), (grad,)
            )[0]
        return torch_npu.npu_swiglu_backward(grad.contiguous(), joined)
