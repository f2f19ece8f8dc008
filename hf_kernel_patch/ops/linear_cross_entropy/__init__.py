"""``linear_cross_entropy(hidden, weight, labels, ...)``: the head and its loss, without logits.

The kernels that serve it; each imports its backend when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hf_kernel_patch.kernels import BaseKernel, Op, register_kernel
from hf_kernel_patch.ops._shared.descriptor import TritonKernel

if TYPE_CHECKING:
    import torch


def _why_fallback(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
    **options: Any,
) -> str | None:
    """Why the head would not take these hidden states either, or takes them in its own way."""
    if hidden.device != weight.device:
        return "hidden states and head are on different devices"
    if hidden.shape[-1:] != weight.shape[1:] or weight.dim() != 2:
        return "the head's weight is not (vocabulary, hidden)"
    import torch

    if not torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != weight.dtype:
        return "hidden states and head have different dtypes"
    if bias is not None and bias.dtype != weight.dtype:
        return "the head's bias has another dtype than its weight"
    return None


LINEAR_CROSS_ENTROPY = Op("linear_cross_entropy", _why_fallback)

#: Exactly rounded gradients of the weight; MiB of logits in hand, None for the kernel's own choice;
#: token accuracy and mean entropy as attributes of the output; logits at once; z-loss.
OPTIONS: dict[str, Any] = {
    "exact": False,
    "memory_mib": None,
    "metrics": False,
    "return_logits": False,
    "z_loss": 0.0,
}


@register_kernel
class TorchFusedLinearCrossEntropy(BaseKernel):
    kernel_id = "torch_fused_linear_cross_entropy"
    implements = LINEAR_CROSS_ENTROPY
    tried_on = ("cpu",)
    function = "hf_kernel_patch.ops.linear_cross_entropy.torch:linear_cross_entropy"
    options = OPTIONS


@register_kernel
class CudaFusedLinearCrossEntropy(TritonKernel):
    kernel_id = "cuda_fused_linear_cross_entropy"
    implements = LINEAR_CROSS_ENTROPY
    function = "hf_kernel_patch.ops.linear_cross_entropy.triton:linear_cross_entropy"
    options = OPTIONS
