"""``linear_cross_entropy(hidden, weight, labels, ...)``: the head and its loss, without logits.

The kernels that serve it; each imports its backend when it is first used.
"""

from __future__ import annotations

from typing import Any

from hf_kernel_patch.registry import BaseKernel, register_kernel


@register_kernel
class TorchFusedLinearCrossEntropy(BaseKernel):
    kernel_id = "torch_fused_linear_cross_entropy"
    op = "linear_cross_entropy"
    function = "hf_kernel_patch.ops.linear_cross_entropy.torch:linear_cross_entropy"

    @classmethod
    def refuse(cls, weight: Any, labels: Any) -> str | None:
        import torch

        if weight.device != labels.device:
            return "labels and head are on different devices"
        if torch.is_autocast_enabled(weight.device.type):
            return "autocast chooses the dtype of the logits"
        return None
