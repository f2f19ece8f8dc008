"""swiglu in plain PyTorch: the activation is recomputed in the backward instead of stored."""

from __future__ import annotations

from typing import Any

import torch

from hf_kernel_patch.ops._shared.autograd import Gradients, Tensors, differentiable
from hf_kernel_patch.ops.swiglu.reference import APPROXIMATE, activate


def swiglu(gate: torch.Tensor, up: torch.Tensor, activation: str = "silu") -> torch.Tensor:
    """As :func:`hf_kernel_patch.ops.swiglu.reference.swiglu`, with the bits of the original."""
    return _swiglu((gate, up), (activation,))


def activate_backward(grad: torch.Tensor, gate: torch.Tensor, activation: str) -> torch.Tensor:
    """The gradient of gate, given that of its activation."""
    if activation == "silu":
        return torch.ops.aten.silu_backward(grad, gate)
    return torch.ops.aten.gelu_backward(grad, gate, approximate=APPROXIMATE[activation])


def _plain(tensors: Tensors, options: tuple[Any, ...]) -> torch.Tensor:
    """(gate, up) and (activation,), in the tensors' dtype."""
    gate, up = tensors
    return activate(gate, *options) * up


def _forward(tensors: Tensors, options: tuple[Any, ...]) -> tuple[torch.Tensor, Tensors]:
    gate, up = tensors
    return activate(gate, *options).mul_(up), ()


def _backward(
    grad: torch.Tensor,
    tensors: Tensors,
    kept: Tensors,
    options: tuple[Any, ...],
    needed: tuple[bool, ...],
) -> Gradients:
    gate, up = tensors
    grad_gate = activate_backward(grad * up, gate, *options) if needed[0] else None
    return grad_gate, activate(gate, *options).mul_(grad) if needed[1] else None


_swiglu = differentiable(_forward, _backward, _plain)
