"""``add_rms_norm(x, residual, weight, eps, offset, cast_first)``: a sum, and its rms_norm.

The kernels that serve it; each imports its backend when it is first used.
"""

from __future__ import annotations

from typing import Any

from hf_kernel_patch.ops.descriptor import TritonKernel
from hf_kernel_patch.ops.rms_norm import NpuFusedRMSNorm
from hf_kernel_patch.registry import BaseKernel, register_kernel


@register_kernel
class TorchFusedAddRMSNorm(BaseKernel):
    kernel_id = "torch_fused_add_rmsnorm"
    op = "add_rms_norm"
    function = "hf_kernel_patch.ops.add_rms_norm.torch:add_rms_norm"


@register_kernel
class CudaFusedAddRMSNorm(TritonKernel):
    kernel_id = "cuda_fused_add_rmsnorm"
    op = "add_rms_norm"
    function = "hf_kernel_patch.ops.add_rms_norm.triton:add_rms_norm"

    @classmethod
    def refuse(cls, x: Any, residual: Any, weight: Any, *options: Any) -> str | None:
        if x.shape != residual.shape:
            return "x and the residual differ in shape"
        if weight.shape != x.shape[-1:] or weight.shape[0] > 65536:
            return "the weight is not one number an element of a row of at most 65536"
        return None


@register_kernel
class NpuFusedAddRMSNorm(BaseKernel):
    kernel_id = "npu_fused_add_rmsnorm"
    op = "add_rms_norm"
    device = "npu"
    backend = "npu"
    requires = ("torch", "torch_npu")
    function = "hf_kernel_patch.ops.add_rms_norm.npu:add_rms_norm"

    @classmethod
    def refuse(cls, x: Any, residual: Any, weight: Any, *options: Any) -> str | None:
        if x.shape != residual.shape:
            return "x and the residual differ in shape"
        return NpuFusedRMSNorm.refuse(x, weight, *options)
