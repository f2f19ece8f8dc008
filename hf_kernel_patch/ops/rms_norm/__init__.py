"""``rms_norm(x, weight, eps, offset, cast_first, gate)``: x over its root mean square, scaled.

The kernels that serve it; each imports its backend when it is first used.
"""

from __future__ import annotations

from typing import Any

from hf_kernel_patch.ops.descriptor import TritonKernel
from hf_kernel_patch.registry import BaseKernel, register_kernel


def why_not(x: Any, weight: Any, gate: Any) -> str | None:
    """Why no kernel here can take a call, or None."""
    if weight.shape != x.shape[-1:]:
        return "the weight is not one number an element of a row"
    if gate is not None and gate.shape != x.shape:
        return "the gate has another shape than x"
    return None


@register_kernel
class TorchFusedRMSNorm(BaseKernel):
    kernel_id = "torch_fused_rmsnorm"
    op = "rms_norm"
    default_on = ("cpu",)
    function = "hf_kernel_patch.ops.rms_norm.torch:rms_norm"

    @classmethod
    def refuse(
        cls,
        x: Any,
        weight: Any,
        eps: float,
        offset: float = 0.0,
        cast_first: bool = True,
        gate: Any = None,
    ) -> str | None:
        return why_not(x, weight, gate)


@register_kernel
class CudaFusedRMSNorm(TritonKernel):
    kernel_id = "cuda_fused_rmsnorm"
    op = "rms_norm"
    function = "hf_kernel_patch.ops.rms_norm.triton:rms_norm"

    @classmethod
    def refuse(
        cls,
        x: Any,
        weight: Any,
        eps: float,
        offset: float = 0.0,
        cast_first: bool = True,
        gate: Any = None,
    ) -> str | None:
        if x.shape and x.shape[-1] > 65536:
            return "rows are of more than 65536 elements"
        return why_not(x, weight, gate)


@register_kernel
class NpuFusedRMSNorm(BaseKernel):
    kernel_id = "npu_fused_rmsnorm"
    op = "rms_norm"
    device = "npu"
    backend = "npu"
    default_on = ("npu",)
    requires = ("torch", "torch_npu")
    function = "hf_kernel_patch.ops.rms_norm.npu:rms_norm"

    @classmethod
    def refuse(
        cls,
        x: Any,
        weight: Any,
        eps: float,
        offset: float = 0.0,
        cast_first: bool = True,
        gate: Any = None,
    ) -> str | None:
        if not 2 <= x.dim() <= 8 or not x.numel():
            return "npu_rms_norm takes 2 to 8 dimensions and an element at least"
        return why_not(x, weight, gate)
