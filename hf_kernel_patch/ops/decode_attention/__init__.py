"""``decode_attention(query, key, value, layer, position, size, ...)``: one new token over a cache.

The kernels that serve it; each imports its backend when it is first used. All are for inference:
they write to the cache in place and have no backward.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from hf_kernel_patch.kernels import BaseKernel, Op, register_kernel
from hf_kernel_patch.ops._shared.descriptor import TritonKernel

if TYPE_CHECKING:
    import torch

    from hf_kernel_patch.ops.decode_attention.memory import LayerCache

#: The longest key or value of a head that a Triton program's registers hold.
WIDEST = 512


def _why_fallback(
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    layer: LayerCache,
    position: torch.Tensor,
    size: int,
    mask: torch.Tensor | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    *,
    one_device: bool = False,
) -> str | None:
    """``one_device``: whether a kernel launches on the query's, whatever the others'."""
    if query.dim() != 4 or query.shape[2] != 1:
        return "not one new token a sequence"
    batch, heads, _, dim = query.shape
    if not query.numel():
        return "no elements"
    if not query.is_floating_point() or query.element_size() not in (2, 4):
        return f"the query is {query.dtype}"
    if query.dtype != layer.dtype:
        return "query and cache differ in dtype"
    if batch != layer.batch or dim != layer.key_dim or heads % layer.heads:
        return "query and cache differ in batch, heads or head dim"
    if max(dim, layer.value_dim) > WIDEST:
        return f"a head dim above {WIDEST}"
    if (key is None) != (value is None):
        return "a key without a value, or a value without a key"
    if key is not None and value is not None:
        if key.dtype != query.dtype or value.dtype != query.dtype:
            return "query, key and value differ in dtype"
        here = (batch, layer.heads, 1)
        if key.shape != (*here, dim) or value.shape != (*here, layer.value_dim):
            return "key or value is no token of the cache"
    if size < 1:
        return "no slots to look at"
    if mask is not None:
        if mask.element_size() != 1 or mask.is_floating_point():
            return f"the mask is {mask.dtype}"
        if mask.shape != (batch, size) and mask.shape != (1, size):
            return "the mask is not (1 or batch, size)"
        if not mask.is_contiguous():
            return "the mask is not contiguous"
    if sinks is not None and sinks.shape != (heads,):
        return "not one sink a head"
    if one_device:
        for tensor in (key, value, layer.address, position, mask, sinks):
            if tensor is not None and tensor.device != query.device:
                return "the tensors differ in device"
    return None


DECODE_ATTENTION = Op("decode_attention", _why_fallback)


@register_kernel
class TorchFusedDecodeAttention(BaseKernel):
    kernel_id = "torch_fused_decode_attention"
    implements = DECODE_ATTENTION
    function = "hf_kernel_patch.ops.decode_attention.torch:decode_attention"


@register_kernel
class CudaFusedDecodeAttention(TritonKernel):
    kernel_id = "cuda_fused_decode_attention"
    implements = DECODE_ATTENTION
    limits: ClassVar[dict[str, float]] = {"one_device": True}
    #: It is captured in CUDA graphs, not traced.
    traceable = False
    function = "hf_kernel_patch.ops.decode_attention.triton:decode_attention"
