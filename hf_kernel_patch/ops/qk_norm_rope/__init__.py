"""``qk_norm_rope(q, k, q_weight, k_weight, eps, cos, sin, ...)``: RMSNorm of every head, and rope.

The kernels that serve it; each imports its backend when it is first used.
"""

from __future__ import annotations

from typing import Any

from hf_kernel_patch.kernels import BaseKernel, register_kernel
from hf_kernel_patch.ops.descriptor import TritonKernel
from hf_kernel_patch.ops.rope import why_not


@register_kernel
class TorchFusedQKNormRoPE(BaseKernel):
    kernel_id = "torch_fused_qk_norm_rope"
    op = "qk_norm_rope"
    function = "hf_kernel_patch.ops.qk_norm_rope.torch:qk_norm_rope"

    @classmethod
    def refuse(
        cls,
        q: Any,
        k: Any,
        q_weight: Any,
        k_weight: Any,
        eps: float,
        cos: Any,
        sin: Any,
        *rest: Any,
    ) -> str | None:
        return why_not(q, k, cos, sin, 2)


@register_kernel
class CudaFusedQKNormRoPE(TritonKernel):
    kernel_id = "cuda_fused_qk_norm_rope"
    op = "qk_norm_rope"
    function = "hf_kernel_patch.ops.qk_norm_rope.operator:qk_norm_rope"

    @classmethod
    def refuse(
        cls,
        q: Any,
        k: Any,
        q_weight: Any,
        k_weight: Any,
        eps: float,
        cos: Any,
        sin: Any,
        *rest: Any,
    ) -> str | None:
        if not q.shape[-1:] == q_weight.shape == k_weight.shape:
            return "the weights are not those of q's and k's rows"
        if not q.device == q_weight.device == k_weight.device:
            return "the tensors are on different devices"
        if cos.dtype != sin.dtype:
            return "cos and sin are of different dtypes"
        return why_not(q, k, cos, sin, 2)
