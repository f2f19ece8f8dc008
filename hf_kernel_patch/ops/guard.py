"""Which calls no replacement may take, whatever the op: torch's modes and kinds of tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad

_PLAIN = (torch.Tensor, torch.nn.Parameter)


def why_not(kernel: Any, arguments: tuple[Any, ...]) -> str | None:
    """Why the original has to take this call, or None. ``kernel`` is a BaseKernel subclass."""
    if torch.compiler.is_compiling() and not kernel.traceable:
        return "torch.compile fuses the original itself"
    if torch._C._are_functorch_transforms_active():
        return "a torch.func transform is active"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace is recording"
    device = None if kernel.device == "any" else kernel.device
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            if type(argument) not in _PLAIN:
                return f"a tensor is a {type(argument).__name__}"
            if device is not None and argument.device.type != device:
                return f"a tensor is on {argument.device.type}"
    return None
