"""``rms_norm(x, weight, eps, offset, cast_first, gate, ...)``: x over its root mean square, scaled.

The kernels that serve it; each imports its backend when it is first used.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

from hf_kernel_patch.kernels import BaseKernel, Op, register_kernel
from hf_kernel_patch.ops._shared.descriptor import TritonKernel

if TYPE_CHECKING:
    import torch

#: The widest rows of the Triton kernels.
WIDEST = 65536


def _why_fallback(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    offset: float = 0.0,
    cast_first: bool = True,
    gate: torch.Tensor | None = None,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    activation: str = "silu",
    cast_to_weight: bool = False,
    cast_scale: bool = False,
    *,
    widest: float = math.inf,
) -> str | None:
    """Rows are of at most ``widest`` elements."""
    shape = x.shape
    if not shape or (weight is not None and weight.shape != shape[-1:]):
        return "the weight is not one number an element of a row"
    if not x.is_floating_point():  # rounded to whole numbers, which ends the gradients
        return "x is not of floating point"
    if shape[-1] > widest:
        return f"rows are of more than {widest} elements"
    if gate is not None and gate.shape != shape:
        return "the gate has another shape than x"
    if group_size is not None and (group_size < 1 or not shape[-1] or shape[-1] % group_size):
        return "a row is not made of whole groups"
    return None


RMS_NORM = Op("rms_norm", _why_fallback)


@register_kernel
class TorchFusedRMSNorm(BaseKernel):
    kernel_id = "torch_fused_rmsnorm"
    implements = RMS_NORM
    default_on = ("cpu",)
    function = "hf_kernel_patch.ops.rms_norm.torch:rms_norm"


@register_kernel
class CudaFusedRMSNorm(TritonKernel):
    kernel_id = "cuda_fused_rmsnorm"
    implements = RMS_NORM
    limits: ClassVar[dict[str, Any]] = {"widest": WIDEST}
    function = "hf_kernel_patch.ops.rms_norm.triton:rms_norm"


@register_kernel
class NpuFusedRMSNorm(BaseKernel):
    kernel_id = "npu_fused_rmsnorm"
    implements = RMS_NORM
    device = "npu"
    backend = "npu"
    default_on = ("npu",)
    requires = ("torch", "torch_npu")
    function = "hf_kernel_patch.ops.rms_norm.npu:rms_norm"

    @classmethod
    def why_fallback(
        cls,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        eps: float,
        offset: float = 0.0,
        cast_first: bool = True,
        gate: torch.Tensor | None = None,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        activation: str = "silu",
        cast_to_weight: bool = False,
        cast_scale: bool = False,
    ) -> str | None:
        if not 2 <= x.dim() <= 8 - (group_size is not None) or not x.numel():
            return "npu_rms_norm takes 2 to 8 dimensions and an element at least"
        if cast_scale and x.element_size() != 4:
            return "npu_rms_norm rounds the norm, not the scale"
        return _why_fallback(x, weight, eps, offset, cast_first, gate, group_size)
