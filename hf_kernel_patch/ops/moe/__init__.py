"""``moe(hidden, index, weights, gate_up, down, activation)``: gated experts on routed tokens.

The kernels that serve it; each imports its backend when it is first used.
"""

from __future__ import annotations

from typing import Any

from hf_kernel_patch.registry import BaseKernel, register_kernel


@register_kernel
class TorchFusedMoE(BaseKernel):
    kernel_id = "torch_fused_moe"
    op = "moe"
    default_on = ("cpu",)
    function = "hf_kernel_patch.ops.moe.torch:moe"

    @classmethod
    def refuse(
        cls, hidden: Any, index: Any, weights: Any, gate_up: Any, down: Any, activation: str
    ) -> str | None:
        import torch

        last = down[0] if isinstance(down, list) else down
        if torch.is_autocast_enabled(hidden.device.type):
            return "autocast chooses the dtype of the products"
        if hidden.dtype != last.dtype:
            return "the hidden states and the experts differ in dtype"
        return None
