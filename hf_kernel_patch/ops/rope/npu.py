"""rope through torch_npu's npu_rotary_mul, in its half and its interleave mode."""

# npu_rotary_mul over npu_apply_rotary_pos_emb, which is for inference, writes over q and k and
# takes head sizes of 64 and 128 alone.
# Its page wants cos and sin within [-1, 1]: YaRN's are divided before it, its results multiplied.

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch_npu

from hf_kernel_patch.ops.rope.angles import scale_of
from hf_kernel_patch.ops.rope.shapes import (
    ELEMENTS,
    FIRST_HALF,
    HALVES,
    INTERLEAVED,
    TO_HALVES,
    as_usual,
    shaped_as,
)

if TYPE_CHECKING:
    from torch.autograd.function import FunctionCtx


class _Options(NamedTuple):
    """How a rotation is done; cos and sin are divided by ``scale`` already.

    ``sorted`` says that pairs of neighbours become halves before it, or halves neighbours after.
    """

    scale: float
    unsqueeze_dim: int
    cast: bool
    upcast: bool
    mode: str
    sorted: str = ""

    def back(self) -> _Options:
        """Of the transpose."""
        other = {"before": "after", "after": "before"}
        return self._replace(cast=False, sorted=other.get(self.sorted, ""))


def rope(
    q: torch.Tensor,
    k: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    unsqueeze_dim: int = 1,
    cast: bool = False,
    pairs: str = HALVES,
    angles: str = ELEMENTS,
    upcast: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As :func:`hf_kernel_patch.ops.rope.reference.rope`, for q and k of three or four dimensions.

    Raises ValueError where cos or sin is not finite, or is first seen while a graph is captured.
    """
    scale = scale_of(cos, sin)
    if scale is None or scale == float("inf"):
        raise ValueError("cos or sin is not finite, or cannot be read now")
    shape = q
    q, k, cos, sin, heads = as_usual(q, k, cos, sin, unsqueeze_dim)
    mode = "interleave" if pairs == INTERLEAVED else "half"
    options = _Options(scale, heads, cast, upcast, mode, "before" if pairs == TO_HALVES else "")
    if scale != 1.0:
        cos, sin = cos / scale, sin / scale
    if angles != ELEMENTS:
        cos, sin = (_of_elements(angle, pairs, angles) for angle in (cos, sin))
    needed = q.requires_grad or (k is not None and k.requires_grad)
    rotate = _RoPE.apply if torch.is_grad_enabled() and needed else _both
    return shaped_as(shape, rotate(q, k, cos, sin, options))


def _of_elements(angle: torch.Tensor, pairs: str, angles: str) -> torch.Tensor:
    """cos or sin for each element, of what was given for each pair."""
    if angles == FIRST_HALF:
        angle = angle[..., : angle.shape[-1] // 2]
    angle = angle.unsqueeze(-1 if pairs == INTERLEAVED else -2)
    both = (2, -1) if pairs != INTERLEAVED else (-1, 2)
    return angle.expand(*angle.shape[:-2], *both).flatten(-2)


def _both(
    q: torch.Tensor, k: torch.Tensor | None, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    return _rotate(q, *rest), None if k is None else _rotate(k, *rest)


def _rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, options: _Options
) -> torch.Tensor:
    # (B, S, heads, D) at all times: attention's q and k lie like that, and the operator's page
    # advises against (B, heads, S, D), whose batch times heads CANN limits by the length.
    transpose = options.unsqueeze_dim == 1
    rows = x.transpose(1, 2) if transpose else x
    promoted = torch.promote_types(torch.promote_types(x.dtype, cos.dtype), sin.dtype)
    to = torch.promote_types(promoted, torch.float32) if options.upcast else promoted
    width = cos.shape[-1]
    cos, sin = cos.unsqueeze(2).to(to), sin.unsqueeze(2).to(to)
    rotary = rows[..., :width].to(to)
    if options.sorted == "before":
        rotary = rotary.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
    if options.mode == "half":
        out = torch_npu.npu_rotary_mul(rotary, cos, sin)
    else:
        out = torch_npu.npu_rotary_mul(rotary, cos, sin, options.mode)
    if options.scale != 1.0:
        out = out.mul_(options.scale)
    if options.sorted == "after":
        out = out.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
    if width < x.shape[-1]:
        out = torch.cat((out, rows[..., width:].to(to)), dim=-1)
    out = out.to(x.dtype if options.cast else promoted)
    return out.transpose(1, 2) if transpose else out


class _RoPE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        q: torch.Tensor,
        k: torch.Tensor | None,
        cos: torch.Tensor,
        sin: torch.Tensor,
        options: _Options,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        ctx.save_for_backward(cos, sin)
        ctx.options, ctx.dtypes = options, (q.dtype, None if k is None else k.dtype)
        outs = _both(q, k, cos, sin, options)
        pairs = [(out, x) for out, x in zip(outs, (q, k), strict=True) if x is not None]
        ctx.mark_non_differentiable(*(out for out, x in pairs if not x.requires_grad))
        return outs

    @staticmethod
    def backward(
        ctx: FunctionCtx, grad_q: torch.Tensor, grad_k: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        # The transpose of the rotation is the operator again, with the two of a pair swapped in
        # sin and negated; npu_rotary_mul_backward would also need q and k and compute cos and sin's
        # gradients. As it is linear, it serves gradients of gradients as well.
        if ctx.options.mode == "half":
            back = sin.roll(sin.shape[-1] // 2, -1).neg()
        else:
            back = sin.unflatten(-1, (-1, 2)).flip(-1).flatten(-2).neg()
        rotate = _RoPE.apply if torch.is_grad_enabled() else _both
        q_dtype, k_dtype = ctx.dtypes
        if k_dtype is None:
            grad_k = None  # autograd makes zeros of a gradient that nobody gave
        found, other = rotate(grad_q, grad_k, cos, back, ctx.options.back())
        return found.to(q_dtype), None if other is None else other.to(k_dtype), None, None, None
