"""``swiglu(gate, up, activation)``: activation(gate) * up.

The kernels that serve it; each imports its backend when it is first used.
"""

from __future__ import annotations

from typing import Any

from hf_kernel_patch.registry import BaseKernel, register_kernel


@register_kernel
class TorchFusedSwiGLU(BaseKernel):
    kernel_id = "torch_fused_swiglu"
    op = "swiglu"
    function = "hf_kernel_patch.ops.swiglu.torch:swiglu"

    @classmethod
    def refuse(cls, gate: Any, up: Any, activation: str) -> str | None:
        if gate.dtype != up.dtype or gate.shape != up.shape:
            return "gate and up differ in dtype or shape"
        return None
