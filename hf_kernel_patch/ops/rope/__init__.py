"""``rope(q, k, cos, sin, unsqueeze_dim, cast)``: rotary position embedding of q and k.

The kernels that serve it; each imports its backend when it is first used.
"""

from __future__ import annotations

import math
from typing import Any

from hf_kernel_patch.ops.descriptor import TritonKernel
from hf_kernel_patch.registry import BaseKernel, register_kernel


@register_kernel
class TorchFusedRoPE(BaseKernel):
    kernel_id = "torch_fused_rope"
    op = "rope"
    default_on = ("cpu",)
    function = "hf_kernel_patch.ops.rope.torch:rope"

    @classmethod
    def refuse(cls, q: Any, k: Any, cos: Any, sin: Any, *options: Any) -> str | None:
        if cos.requires_grad or sin.requires_grad:
            return "cos or sin needs a gradient"
        if cos.shape[-1] % 2 or cos.shape[-1] > q.shape[-1]:
            return "cos is wider than q or of an odd width"
        return None


@register_kernel
class CudaFusedRoPE(TritonKernel):
    kernel_id = "cuda_fused_rope"
    op = "rope"
    function = "hf_kernel_patch.ops.rope.triton:rope"

    @classmethod
    def refuse(
        cls, q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1, cast: bool = False
    ) -> str | None:
        return why_not(q, k, cos, sin, unsqueeze_dim)


def why_not(q: Any, k: Any, cos: Any, sin: Any, heads: int) -> str | None:
    """Why kernels over the heads of q and k, dimension ``heads`` of four, cannot take a call."""
    if cos.requires_grad or sin.requires_grad:
        return "cos or sin needs a gradient"
    if q.dim() != 4 or k.dim() != 4 or cos.dim() != 3 or heads not in (1, 2):
        return "q and k are not of four dimensions or cos not of three"
    batch, tokens, size = q.shape[0], q.shape[3 - heads], q.shape[3]
    if (k.shape[0], k.shape[3 - heads], k.shape[3]) != (batch, tokens, size):
        return "q and k differ in more than their heads"
    rows, length, width = cos.shape
    if rows not in (1, batch) or length not in (1, tokens) or sin.shape != cos.shape:
        return "cos and sin are not of q's batch and length"
    if width % 2 or width > size or size > 1024:
        return "cos is wider than q or of an odd width, or q is wider than 1024"
    if not q.device == k.device == cos.device == sin.device:
        return "the tensors are on different devices"
    return None


@register_kernel
class NpuFusedRoPE(BaseKernel):
    kernel_id = "npu_fused_rope"
    op = "rope"
    device = "npu"
    backend = "npu"
    default_on = ("npu",)
    requires = ("torch", "torch_npu")
    function = "hf_kernel_patch.ops.rope.npu:rope"

    @classmethod
    def refuse(
        cls, q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1, cast: bool = False
    ) -> str | None:
        heads = unsqueeze_dim % 4  # of the four dimensions that cos has then
        if why := why_not(q, k, cos, sin, heads):
            return why
        if cos.shape[1] != q.shape[3 - heads] or not (q.numel() and k.numel()):
            return "there are no angles for every token, or nothing to rotate"
        if cos.shape[-1] >= 896 or max(q.shape[0], q.shape[heads], k.shape[heads]) >= 1000:
            return "npu_rotary_mul takes widths under 896, batches and heads under 1000"
        from hf_kernel_patch.ops.rope.angles import scale_of

        scale = scale_of(cos, sin)
        if scale is None:
            return (
                "npu_rotary_mul takes cos and sin within [-1, 1], unread while a graph is captured"
            )
        return None if scale < math.inf else "cos or sin is not finite"
