"""``rms_norm(x, weight, eps, offset, cast_first)``: x over its root mean square, scaled.

The kernels that serve it; each imports its backend when it is first used.
"""

from __future__ import annotations

from hf_kernel_patch.registry import BaseKernel, register_kernel


@register_kernel
class TorchFusedRMSNorm(BaseKernel):
    kernel_id = "torch_fused_rmsnorm"
    op = "rms_norm"
    default_on = ("cpu",)
    function = "hf_kernel_patch.ops.rms_norm.torch:rms_norm"
