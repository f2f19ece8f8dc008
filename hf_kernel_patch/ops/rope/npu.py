"""rope through torch_npu's npu_rotary_mul, in its half mode."""

# npu_rotary_mul over npu_apply_rotary_pos_emb, which is for inference, writes over q and k and
# takes head sizes of 64 and 128 alone.
# Its page wants cos and sin within [-1, 1]: YaRN's are divided before it, its results multiplied.

from __future__ import annotations

from typing import Any

import torch
import torch_npu

from hf_kernel_patch.ops.rope.angles import scale_of


def rope(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    unsqueeze_dim: int = 1,
    cast: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`hf_kernel_patch.ops.rope.reference.rope`, for q and k of four dimensions.

    Raises ValueError where cos or sin is not finite, or is first seen while a graph is captured.
    """
    scale = scale_of(cos, sin)
    if scale is None or scale == float("inf"):
        raise ValueError("cos or sin is not finite, or cannot be read now")
    if scale != 1.0:
        cos, sin = cos / scale, sin / scale
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        return _RoPE.apply(q, k, cos, sin, scale, unsqueeze_dim, cast)
    return _both(q, k, cos, sin, scale, unsqueeze_dim, cast)


def _both(q: torch.Tensor, k: torch.Tensor, *options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return _rotate(q, *options), _rotate(k, *options)


def _rotate(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    scale: float,
    unsqueeze_dim: int,
    cast: bool,
) -> torch.Tensor:
    # (B, S, heads, D) at all times: attention's q and k lie like that, and the operator's page
    # advises against (B, heads, S, D), whose batch times heads CANN limits by the length.
    turn = unsqueeze_dim % 4 == 1
    rows = x.transpose(1, 2) if turn else x
    to, width = torch.promote_types(x.dtype, cos.dtype), cos.shape[-1]
    cos, sin = cos.unsqueeze(2).to(to), sin.unsqueeze(2).to(to)
    out = torch_npu.npu_rotary_mul(rows[..., :width].to(to), cos, sin)
    if scale != 1.0:
        out = out.mul_(scale)
    if width < x.shape[-1]:
        out = torch.cat((out, rows[..., width:].to(to)), dim=-1)
    if cast:
        out = out.to(x.dtype)
    return out.transpose(1, 2) if turn else out


class _RoPE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        *options: Any,  # scale, unsqueeze_dim, cast
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.options, ctx.dtypes = options[:2], (q.dtype, k.dtype)
        outs = _both(q, k, cos, sin, *options)
        frozen = [out for out, x in zip(outs, (q, k), strict=True) if not x.requires_grad]
        ctx.mark_non_differentiable(*frozen)
        return outs

    @staticmethod
    def backward(ctx: Any, grad_q: torch.Tensor, grad_k: torch.Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        # The transpose of the rotation is the operator again, with the halves of sin swapped and
        # negated; npu_rotary_mul_backward would also need q and k and compute cos and sin's
        # gradients. As it is linear, it serves gradients of gradients as well.
        back = sin.roll(sin.shape[-1] // 2, -1).neg()
        turn = _RoPE.apply if torch.is_grad_enabled() else _both
        found = turn(grad_q, grad_k, cos, back, *ctx.options, False)
        turned = (grad.to(dtype) for grad, dtype in zip(found, ctx.dtypes, strict=True))
        return *turned, None, None, None, None, None
