"""``lora(x, a, b, scaling, weight, ...)``: a linear layer with a low-rank adapter beside it.

The kernels that serve it; each imports its backend when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_kernel_patch.kernels import BaseKernel, Op, register_kernel

if TYPE_CHECKING:
    import torch


def _why_fallback(
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    base: torch.Tensor | None = None,
    dropped: torch.Tensor | None = None,
    b_bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
) -> str | None:
    if not isinstance(scaling, (int, float)):
        return f"the scaling is a {type(scaling).__name__}"
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or x.shape[-1:] != a.shape[1:]:
        return "x, A and B do not fit each other"
    if a.dtype != b.dtype:
        return "A and B differ in dtype"
    result = base if weight is None else weight
    if result is None:
        return "neither a weight nor a result to add to"
    if weight is not None and weight.dtype != x.dtype:
        return "x and the layer differ in dtype"
    if not all(one.is_floating_point() for one in (x, a)):
        return f"x is {x.dtype}, A is {a.dtype}"
    if any(one.device != x.device for one in (result, a, b)):
        return "x, the layer and the adapter differ in device"
    return None


LORA = Op("lora", _why_fallback)


@register_kernel
class TorchFusedLora(BaseKernel):
    kernel_id = "torch_fused_lora"
    implements = LORA
    function = "hf_kernel_patch.ops.lora.torch:lora"
