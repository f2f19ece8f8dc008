"""Conversions of dtype and of memory format: what the wheel's ``to`` and deepcopy are made of."""

from __future__ import annotations

import torch

from . import operator

_PLAIN = 2  # ACL_FORMAT_ND


@operator("_npu_dtype_cast")
def cast(input: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return input.to(dtype)


@operator("_npu_dtype_cast_backward")
def cast_backward(grad: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return grad.to(dtype)


@operator("npu_format_cast")
def format_cast(input: torch.Tensor, acl_format: int) -> torch.Tensor:
    """A copy in the plain format; the device's blocked formats do not exist here."""
    if acl_format != _PLAIN:
        raise NotImplementedError(f"npusim: npu_format_cast to format {acl_format}")
    return input
