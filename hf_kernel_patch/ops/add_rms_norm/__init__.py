"""``add_rms_norm(x, residual, weight, eps, offset, cast_first)``: a sum, and its rms_norm.

The kernels that serve it; each imports its backend when it is first used.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

from hf_kernel_patch.kernels import BaseKernel, Op, register_kernel
from hf_kernel_patch.ops._shared.descriptor import TritonKernel
from hf_kernel_patch.ops.rms_norm import WIDEST, NpuFusedRMSNorm

if TYPE_CHECKING:
    import torch


def _why_fallback(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    offset: float = 0.0,
    cast_first: bool = True,
    *,
    widest: float = math.inf,
) -> str | None:
    """Rows are of at most ``widest`` elements."""
    shape = x.shape
    if shape != residual.shape:
        return "x and the residual differ in shape"
    if not shape or weight.shape != shape[-1:]:
        return "the weight is not one number an element of a row"
    if not (x.is_floating_point() and residual.is_floating_point()):
        return "x and the residual are not both of floating point"
    if shape[-1] > widest:
        return f"rows are of more than {widest} elements"
    return None


ADD_RMS_NORM = Op("add_rms_norm", _why_fallback)


@register_kernel
class TorchFusedAddRMSNorm(BaseKernel):
    kernel_id = "torch_fused_add_rmsnorm"
    implements = ADD_RMS_NORM
    tried_on = ("cpu",)
    function = "hf_kernel_patch.ops.add_rms_norm.torch:add_rms_norm"


@register_kernel
class CudaFusedAddRMSNorm(TritonKernel):
    kernel_id = "cuda_fused_add_rmsnorm"
    implements = ADD_RMS_NORM
    limits: ClassVar[dict[str, float]] = {"widest": WIDEST}
    function = "hf_kernel_patch.ops.add_rms_norm.triton:add_rms_norm"


@register_kernel
class NpuFusedAddRMSNorm(BaseKernel):
    kernel_id = "npu_fused_add_rmsnorm"
    implements = ADD_RMS_NORM
    device = "npu"
    backend = "npu"
    requires = ("torch", "torch_npu")
    function = "hf_kernel_patch.ops.add_rms_norm.npu:add_rms_norm"

    @classmethod
    def why_fallback(
        cls, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, *options: Any
    ) -> str | None:
        if x.shape != residual.shape:
            return "x and the residual differ in shape"
        if not residual.is_floating_point():
            return "the residual is not of floating point"
        return NpuFusedRMSNorm.why_fallback(x, weight, *options)
