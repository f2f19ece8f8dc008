"""Which calls no replacement may take, whatever the op: torch's modes and kinds of tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad
from torch.fx import Proxy

from hf_kernel_patch.kernels import Kernel

_DTYPES = {
    torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.bool
}  # fmt: skip
_mode, _PROXY = torch._C._get_dispatch_mode, torch._C._TorchDispatchModeKey.PROXY
# By names of their own, since it is asked at every call and each attribute costs 30 ns.
_compiling = torch.compiler.is_compiling
_transforms, _tracing = torch._C._are_functorch_transforms_active, torch._C._get_tracing_state
_Tensor, _Parameter = torch.Tensor, torch.nn.Parameter


def why_fallback(kernel: Kernel, arguments: tuple[Any, ...]) -> str | None:
    """Why the original has to take this call, or None. ``kernel`` is a BaseKernel subclass.

    Asked at every call of every site, so it does no more than it must.
    """
    if _compiling():
        if not kernel.traceable:
            return "torch.compile fuses the original itself"
    elif _mode(_PROXY) is not None:
        return "make_fx is tracing"
    if _transforms():
        return "a torch.func transform is active"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    if _tracing() is not None:
        return "torch.jit.trace is recording"
    device = kernel.device
    for argument in arguments:
        tensor_type = type(argument)
        if tensor_type is _Tensor or tensor_type is _Parameter:
            if argument.dtype not in _DTYPES:
                return f"a tensor is {str(argument.dtype).removeprefix('torch.')}"
            # Of all ways to ask for a device, the flags cost the least host time.
            if device == "cuda":
                elsewhere = not argument.is_cuda
            else:
                elsewhere = argument.is_meta or (device != "any" and device != argument.device.type)
            if elsewhere:
                return f"a tensor is on {argument.device.type}"
        elif isinstance(argument, _Tensor):
            return f"a tensor is a {tensor_type.__name__}"
        elif isinstance(argument, Proxy):
            return "torch.fx is tracing"
    # What is not laid out in strides comes as what the layer was called with, which is first.
    first = arguments[0] if arguments else None
    if isinstance(first, _Tensor) and (first.layout is not torch.strided or first.is_nested):
        return f"a tensor is {'nested' if first.is_nested else first.layout}"
    return None
