"""swiglu in plain PyTorch: the activation is recomputed in the backward instead of stored."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from hf_kernel_patch.ops.autograd import eager_gradients


def swiglu(gate: torch.Tensor, up: torch.Tensor, activation: str = "silu") -> torch.Tensor:
    """As :func:`hf_kernel_patch.ops.swiglu.reference.swiglu`, with the bits of the original."""
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        return _SwiGLU.apply(gate, up, activation)
    return activate(gate, activation).mul_(up)


def activate(gate: torch.Tensor, activation: str) -> torch.Tensor:
    """silu or tanh-gelu of gate, a new tensor."""
    return F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")


def activate_backward(grad: torch.Tensor, gate: torch.Tensor, activation: str) -> torch.Tensor:
    """The gradient of gate, given that of its activation."""
    if activation == "silu":
        return torch.ops.aten.silu_backward(grad, gate)
    return torch.ops.aten.gelu_backward(grad, gate, approximate="tanh")


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return activate(gate, activation).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        gate, up = ctx.saved_tensors
        activation = ctx.activation
        if torch.is_grad_enabled():
            again = eager_gradients(lambda a, b: activate(a, activation) * b, (gate, up), (grad,))
            return *again, None
        grad_gate = grad_up = None
        if ctx.needs_input_grad[0]:
            grad_gate = activate_backward(grad * up, gate, activation)
        if ctx.needs_input_grad[1]:
            grad_up = activate(gate, activation).mul_(grad)
        return grad_gate, grad_up, None
