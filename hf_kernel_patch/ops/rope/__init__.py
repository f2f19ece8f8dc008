"""``rope(q, k, cos, sin, unsqueeze_dim, cast, pairs, angles, upcast)``: rotary position embedding.

The kernels that serve it; each imports its backend when it is first used.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from hf_kernel_patch.kernels import BaseKernel, Op, register_kernel
from hf_kernel_patch.ops._shared.descriptor import TritonKernel
from hf_kernel_patch.ops.rope.shapes import (
    ELEMENTS,
    HALVES,
    INTERLEAVED,
    PER_PAIR,
    heads_of,
    usual,
    width_of,
)

if TYPE_CHECKING:
    import torch

GRADIENT = "cos or sin needs a gradient"
DIMENSIONS = "q and k are not of the dimensions that cos and sin go with"


def _why_fallback(
    q: torch.Tensor,
    k: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    unsqueeze_dim: int = 1,
    cast: bool = False,
    pairs: str = HALVES,
    angles: str = ELEMENTS,
    upcast: bool = False,
) -> str | None:
    if cos.requires_grad or sin.requires_grad:
        return GRADIENT
    size, width = q.shape[-1], width_of(cos, angles)
    if not 0 < width <= size or width % 2 or sin.shape[-1] != cos.shape[-1]:
        return "cos is wider than q, of an odd width or of another than sin"
    if k is not None and k.shape[-1] != size:
        return "q and k differ in the size of a head"
    return None


ROPE = Op("rope", _why_fallback)


@register_kernel
class TorchFusedRoPE(BaseKernel):
    kernel_id = "torch_fused_rope"
    implements = ROPE
    default_on = ("cpu",)
    function = "hf_kernel_patch.ops.rope.torch:rope"

    @classmethod
    def no_gain(
        cls,
        q: torch.Tensor,
        k: torch.Tensor | None,
        cos: torch.Tensor,
        sin: torch.Tensor,
        unsqueeze_dim: int = 1,
        cast: bool = False,
        pairs: str = HALVES,
        *options: Any,
    ) -> str | None:
        if pairs != HALVES and q.dtype.itemsize > 2:
            return "pairs of neighbours are no faster in float32 than the original"
        return None


@register_kernel
class CudaFusedRoPE(TritonKernel):
    kernel_id = "cuda_fused_rope"
    implements = ROPE
    function = "hf_kernel_patch.ops.rope.triton:rope"

    @classmethod
    def why_fallback(
        cls,
        q: torch.Tensor,
        k: torch.Tensor | None,
        cos: torch.Tensor,
        sin: torch.Tensor,
        unsqueeze_dim: int = 1,
        cast: bool = False,
        pairs: str = HALVES,
        angles: str = ELEMENTS,
        *options: Any,
    ) -> str | None:
        if usual(q, cos, unsqueeze_dim):
            return why_fallback_over_heads(q, k, cos, sin, unsqueeze_dim, angles)
        return why_fallback_of_any_shape(q, k, cos, sin, unsqueeze_dim, angles)


def why_fallback_over_heads(
    q: torch.Tensor,
    k: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    heads: int,
    angles: str = ELEMENTS,
) -> str | None:
    """Why kernels over the heads of q and k, dimension ``heads`` of four, cannot take a call.

    k may be None.
    """
    if cos.requires_grad or sin.requires_grad:
        return GRADIENT
    shape = q.shape
    other = shape if k is None else k.shape
    why = _why_fallback_shapes(shape, other, cos.shape, sin.shape, heads, angles)
    return why or _why_fallback_devices(q, k, cos, sin)


def why_fallback_of_any_shape(
    q: torch.Tensor,
    k: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    unsqueeze_dim: int,
    angles: str = ELEMENTS,
) -> str | None:
    """The same for q and k of three dimensions, or cos of two."""
    if cos.requires_grad or sin.requires_grad:
        return GRADIENT
    heads = heads_of(q, cos, unsqueeze_dim)
    if not heads or sin.dim() != cos.dim() or (k is not None and k.dim() != q.dim()):
        return DIMENSIONS
    first, second = ((1,) * (4 - x.dim()) + tuple(x.shape) for x in (q, q if k is None else k))
    third, fourth = ((1,) * (3 - x.dim()) + tuple(x.shape) for x in (cos, sin))
    why = _why_fallback_shapes(first, second, third, fourth, heads, angles)
    return why or _why_fallback_devices(q, k, cos, sin)


def _why_fallback_shapes(
    q: tuple[int, ...],
    k: tuple[int, ...],
    cos: tuple[int, ...],
    sin: tuple[int, ...],
    heads: int,
    angles: str,
) -> str | None:
    if len(q) != 4 or len(k) != 4 or len(cos) != 3 or heads not in (1, 2):
        return DIMENSIONS
    batch, tokens, size = q[0], q[3 - heads], q[3]
    if (k[0], k[3 - heads], k[3]) != (batch, tokens, size):
        return "q and k differ in more than their heads"
    rows, length, width = cos
    if rows not in (1, batch) or length not in (1, tokens) or sin != cos:
        return "cos and sin are not of q's batch and length"
    if angles == PER_PAIR:
        width *= 2
    if width % 2 or not 0 < width <= size or size > 1024:
        return "cos is wider than q or of an odd width, or q is wider than 1024"
    return None


def _why_fallback_devices(
    q: torch.Tensor, k: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor
) -> str | None:
    device = q.device
    if cos.device == device == sin.device and (k is None or k.device == device):
        return None
    return "the tensors are on different devices"


@register_kernel
class NpuFusedRoPE(BaseKernel):
    kernel_id = "npu_fused_rope"
    implements = ROPE
    device = "npu"
    backend = "npu"
    default_on = ("npu",)
    requires = ("torch", "torch_npu")
    function = "hf_kernel_patch.ops.rope.npu:rope"

    @classmethod
    def why_fallback(
        cls,
        q: torch.Tensor,
        k: torch.Tensor | None,
        cos: torch.Tensor,
        sin: torch.Tensor,
        unsqueeze_dim: int = 1,
        cast: bool = False,
        pairs: str = HALVES,
        angles: str = ELEMENTS,
        *options: Any,
    ) -> str | None:
        if why := why_fallback_of_any_shape(q, k, cos, sin, unsqueeze_dim, angles):
            return why
        heads = heads_of(q, cos, unsqueeze_dim) - 4  # from the last dimension
        counts = [x.shape[heads] for x in (q, k) if x is not None]
        batch = q.shape[0] if q.dim() == 4 else 1
        if cos.shape[-2] != q.shape[-5 - heads] or not all(
            x.numel() for x in (q, k) if x is not None
        ):
            return "there are no angles for every token, or nothing to rotate"
        if width_of(cos, angles) >= 896 or max(batch, *counts) >= 1000:
            return "npu_rotary_mul takes widths under 896, batches and heads under 1000"
        if pairs == INTERLEAVED and (
            batch * max(counts) >= 1000 or (cos.dim() == 3 and cos.shape[0] > 1)
        ):
            return (
                "npu_rotary_mul takes pairs of neighbours for cos and sin of all sequences, and "
                "sequences times heads under 1000"
            )
        from hf_kernel_patch.ops.rope.angles import scale_of

        scale = scale_of(cos, sin)
        if scale is None:
            return (
                "npu_rotary_mul takes cos and sin within [-1, 1], unread while a graph is captured"
            )
        return None if scale < math.inf else "cos or sin is not finite"
