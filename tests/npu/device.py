"""What the tests of the kernels share: the kernels by op, tensors on the device, counted calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hf_kernel_patch import registry
from npusim import calls, reset_calls

KERNELS = {
    "rms_norm": "npu_fused_rmsnorm",
    "rope": "npu_fused_rope",
    "swiglu": "npu_fused_swiglu",
    "moe": "npu_fused_moe",
    "add_rms_norm": "npu_fused_add_rmsnorm",
}


def kernel_of(op: str) -> Any:
    return registry.kernels()[KERNELS[op]]


def function_of(op: str) -> Any:
    return kernel_of(op).load()


def drawn(
    *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, grad: bool = True
) -> torch.Tensor:
    """A normal random tensor on the device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to("npu", dtype).requires_grad_(grad)


def used(function: Callable[..., Any], *arguments: Any) -> dict[str, int]:
    """Operator name -> calls on the device while the function ran."""
    reset_calls()
    function(*arguments)
    return calls()


def rotary(
    q: torch.Tensor, batch: int = 1, width: int = 64, heads: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    angles = drawn(batch, q.shape[3 - heads], width // 2, seed=5, grad=False).float()
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(q.dtype), angles.sin().to(q.dtype)
