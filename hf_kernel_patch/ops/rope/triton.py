"""rope in Triton: q and k in one launch, out of place, and backward by the same kernel."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from hf_kernel_patch.ops.heads.triton import (
    dense,
    empty,
    heads,
    inner,
    load,
    load_halves,
    place,
    plain_angles,
    plain_rows,
    power,
    rows,
    store,
    strides,
    tile,
    turned,
    unit,
)
from hf_kernel_patch.ops.launch import Launch, launcher


@triton.jit(
    do_not_specialize=[
        "tokens",
        *("q_batch", "q_token", "q_head", "k_batch", "k_token", "k_head"),
        *("cos_batch", "cos_token"),
    ]
)
def _rope_kernel(
    q,  # (B, S, QH, D) by strides
    k,  # (B, S, KH, D) by strides
    q_out,  # dense
    k_out,
    cos,  # (1 or B, 1 or S, R) by strides
    sin,
    tokens: tl.int32,  # S
    q_batch: tl.int64,  # strides, multiples of UNIT
    q_token: tl.int64,
    q_head: tl.int64,
    k_batch: tl.int64,
    k_token: tl.int64,
    k_head: tl.int64,
    cos_batch: tl.int64,
    cos_token: tl.int64,
    QH: tl.constexpr,
    KH: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HALF: tl.constexpr,
    TAIL: tl.constexpr,
    INNER: tl.constexpr,
    BACK: tl.constexpr,
    UNIT: tl.constexpr,
):
    batch, t, group = place(tl.program_id(0), tokens, GROUPS, BLOCK_T)
    qh, kh = heads(group, BLOCK_Q), heads(group, BLOCK_K)
    here = t < tokens
    q_mask, k_mask = here & (qh < QH), here & (kh < KH)
    q += rows(batch, t, qh, q_batch, q_token, q_head, UNIT)
    k += rows(batch, t, kh, k_batch, k_token, k_head, UNIT)
    angle = rows(batch, t, 0, cos_batch, cos_token, 0, UNIT)
    q1, q2, q3 = load(q, q_mask, D, R, HALF, TAIL)
    k1, k2, k3 = load(k, k_mask, D, R, HALF, TAIL)
    cos1, cos2 = load_halves(cos + angle, here, R, HALF)
    sin1, sin2 = load_halves(sin + angle, here, R, HALF)
    q1, q2 = turned(q1, q2, cos1, cos2, sin1, sin2, BACK)
    k1, k2 = turned(k1, k2, cos1, cos2, sin1, sin2, BACK)
    q_out += dense(batch, t, qh, tokens, QH, D, INNER)
    k_out += dense(batch, t, kh, tokens, KH, D, INNER)
    store(q_out, q1, q2, q3, q_mask, D, R, HALF, TAIL)
    store(k_out, k1, k2, k3, k_mask, D, R, HALF, TAIL)


@cache
def _launcher(
    dtypes: tuple[torch.dtype, ...],
    heads: tuple[int, int],
    size: int,
    width: int,
    inner: bool,
    *options: Any,
) -> tuple[Launch, int, int]:
    """What launches on tensors of these dtypes, and its groups of heads and block of tokens.

    ``options`` are the kernel's last arguments.
    """
    *blocks, warps = tile(*heads, size, inner)
    static = (*heads, size, width, *blocks, power(width // 2), power(size - width), *options)
    return launcher(_rope_kernel, static, warps), blocks[0], blocks[1]


def _rotate(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    unsqueeze_dim: int,
    q_dtype: torch.dtype,
    k_dtype: torch.dtype,
    inner_out: bool,
    back: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k turned by the angles in one launch, or ``back`` by the transpose of that."""
    q_out, k_out = _results(q, k, cos, sin, unsqueeze_dim, q_dtype, k_dtype, inner_out, back)
    batch, tokens, size = q.shape[0], q.shape[3 - unsqueeze_dim], q.shape[3]
    if not batch * tokens:
        return q_out, k_out
    q, k = plain_rows(q), plain_rows(k)
    cos, sin, *cos_strides = plain_angles(cos, sin)
    numbers = (*strides(q, unsqueeze_dim), *strides(k, unsqueeze_dim), *cos_strides)
    launch, groups, block = _launcher(
        (q.dtype, k.dtype, q_dtype, k_dtype, cos.dtype, sin.dtype),
        (q.shape[unsqueeze_dim], k.shape[unsqueeze_dim]),
        size,
        cos.shape[2],
        numbers[2] <= numbers[1],
        *(inner_out, back, unit(*numbers)),
    )
    programs = batch * -(-tokens // block) * groups
    launch(programs, (q, k, q_out, k_out, cos, sin), (tokens, *numbers))
    return q_out, k_out


def _results(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    unsqueeze_dim: int,
    q_dtype: torch.dtype,
    k_dtype: torch.dtype,
    inner_out: bool,
    back: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """New tensors for q and k turned."""
    batch, tokens, size = q.shape[0], q.shape[3 - unsqueeze_dim], q.shape[3]
    q_heads, k_heads = q.shape[unsqueeze_dim], k.shape[unsqueeze_dim]
    return (
        empty(q, batch, tokens, q_heads, size, unsqueeze_dim, inner_out, q_dtype),
        empty(q, batch, tokens, k_heads, size, unsqueeze_dim, inner_out, k_dtype),
    )


_operator = torch.library.custom_op(
    "hf_kernel_patch::rope",
    _rotate,
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor cos, Tensor sin, int unsqueeze_dim, ScalarType q_dtype, "
    "ScalarType k_dtype, bool inner_out, bool back) -> (Tensor, Tensor)",
)


_operator.register_fake(_results)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Keep what the backward needs: the angles, not q and k, as the map is linear."""
    q, k, cos, sin, unsqueeze_dim, _, _, _, back = inputs
    ctx.save_for_backward(cos, sin)
    ctx.options = unsqueeze_dim, q.dtype, k.dtype, inner(q, unsqueeze_dim), not back


def _operator_backward(ctx: Any, *grads: torch.Tensor) -> Any:
    return *_operator(*grads, *ctx.saved_tensors, *ctx.options), *[None] * 7


_operator.register_autograd(_operator_backward, setup_context=_remember)


class _RoPE(torch.autograd.Function):
    """The operator without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        _remember(ctx, inputs, None)
        found = _rotate(*inputs)
        frozen = [out for out, need in zip(found, ctx.needs_input_grad[:2]) if not need]
        ctx.mark_non_differentiable(*frozen)
        return found

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        turn = _RoPE.apply if torch.is_grad_enabled() else _rotate
        return *turn(*grads, *ctx.saved_tensors, *ctx.options), *[None] * 7


def rope(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    unsqueeze_dim: int = 1,
    cast: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`hf_kernel_patch.ops.rope.reference.rope`, for q and k of four dimensions.

    Arithmetic is in float32 and rounds once. The results are dense and lie in memory as q does:
    the heads of a token side by side, or the tokens of a head. The gradients of q and k lie as q.
    """
    q_dtype = q.dtype if cast else torch.promote_types(q.dtype, cos.dtype)
    k_dtype = k.dtype if cast else torch.promote_types(k.dtype, cos.dtype)
    arguments = q, k, cos, sin, unsqueeze_dim, q_dtype, k_dtype, inner(q, unsqueeze_dim), False
    if torch.compiler.is_compiling():
        return _operator(*arguments)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        return _RoPE.apply(*arguments)
    return _rotate(*arguments)
