"""``qk_norm_rope(q, k, q_weight, k_weight, eps, cos, sin, ...)``: RMSNorm of every head, and rope.

The kernels that serve it; each imports its backend when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hf_kernel_patch.kernels import BaseKernel, Op, register_kernel
from hf_kernel_patch.ops._shared.descriptor import TritonKernel
from hf_kernel_patch.ops.rope import why_fallback_over_heads
from hf_kernel_patch.ops.rope.shapes import ELEMENTS, HALVES

if TYPE_CHECKING:
    import torch


def _why_fallback(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    unsqueeze_dim: int = 1,
    offset: float = 0.0,
    cast_first: bool = True,
    cast: bool = False,
    upcast: bool = False,
    pairs: str = HALVES,
    angles: str = ELEMENTS,
) -> str | None:
    return why_fallback_over_heads(q, k, cos, sin, 2)


QK_NORM_ROPE = Op("qk_norm_rope", _why_fallback)


@register_kernel
class TorchFusedQKNormRoPE(BaseKernel):
    kernel_id = "torch_fused_qk_norm_rope"
    implements = QK_NORM_ROPE
    tried_on = ("cpu",)
    function = "hf_kernel_patch.ops.qk_norm_rope.torch:qk_norm_rope"


@register_kernel
class CudaFusedQKNormRoPE(TritonKernel):
    kernel_id = "cuda_fused_qk_norm_rope"
    implements = QK_NORM_ROPE
    function = "hf_kernel_patch.ops.qk_norm_rope.operator:qk_norm_rope"

    @classmethod
    def why_fallback(
        cls,
        q: torch.Tensor,
        k: torch.Tensor,
        q_weight: torch.Tensor,
        k_weight: torch.Tensor,
        eps: float,
        cos: torch.Tensor,
        sin: torch.Tensor,
        *rest: Any,
    ) -> str | None:
        if not q.shape[-1:] == q_weight.shape == k_weight.shape:
            return "the weights are not those of q's and k's rows"
        if not q.device == q_weight.device == k_weight.device:
            return "the tensors are on different devices"
        if cos.dtype != sin.dtype:
            return "cos and sin are of different dtypes"
        return why_fallback_over_heads(q, k, cos, sin, 2)
