"""``rope(q, k, cos, sin, unsqueeze_dim, cast)``: rotary position embedding of q and k.

The kernels that serve it; each imports its backend when it is first used.
"""

from __future__ import annotations

from typing import Any

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
