"""``swiglu(gate, up, activation)``: activation(gate) * up.

The kernels that serve it; each imports its backend when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from hf_kernel_patch.kernels import BaseKernel, Op, register_kernel
from hf_kernel_patch.ops._shared.descriptor import TritonKernel

if TYPE_CHECKING:
    import torch


def _why_fallback(
    gate: torch.Tensor, up: torch.Tensor, activation: str = "silu", *, one_device: bool = False
) -> str | None:
    """``one_device``: whether a kernel launches on the first tensor's, whatever the other's."""
    if gate.dtype != up.dtype or gate.shape != up.shape:
        return "gate and up differ in dtype or shape"
    if one_device and gate.device != up.device:
        return "gate and up differ in device"
    return None


SWIGLU = Op("swiglu", _why_fallback)


@register_kernel
class TorchFusedSwiGLU(BaseKernel):
    kernel_id = "torch_fused_swiglu"
    implements = SWIGLU
    tried_on = ("cpu",)
    function = "hf_kernel_patch.ops.swiglu.torch:swiglu"


@register_kernel
class CudaFusedSwiGLU(TritonKernel):
    kernel_id = "cuda_fused_swiglu"
    implements = SWIGLU
    limits: ClassVar[dict[str, float]] = {"one_device": True}
    function = "hf_kernel_patch.ops.swiglu.triton:swiglu"


@register_kernel
class NpuFusedSwiGLU(BaseKernel):
    kernel_id = "npu_fused_swiglu"
    implements = SWIGLU
    device = "npu"
    backend = "npu"
    default_on = ("npu",)
    requires = ("torch", "torch_npu")
    function = "hf_kernel_patch.ops.swiglu.npu:swiglu"

    @classmethod
    def why_fallback(
        cls, gate: torch.Tensor, up: torch.Tensor, activation: str = "silu"
    ) -> str | None:
        # npu_geglu's page does not say which half it activates, npu_gelu_mul has no backward.
        if activation != "silu":
            return f"npu_swiglu computes silu, not {activation}"
        if gate.dtype != up.dtype or gate.shape != up.shape:
            return "gate and up differ in dtype or shape"
        if not 1 <= gate.dim() <= 8 or not gate.numel():
            return "npu_swiglu takes 1 to 8 dimensions and an element at least"
        return None
