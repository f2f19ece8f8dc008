"""rope in Triton: q and k in one launch, out of place, and backward by the same kernel."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from hf_kernel_patch.ops._shared.fused import fused_op
from hf_kernel_patch.ops._shared.heads.triton import (
    empty,
    inner,
    plain_angles,
    plain_rows,
    power,
    strides,
    tile,
    unit,
)
from hf_kernel_patch.ops._shared.launch import Launch, cdiv, launcher
from hf_kernel_patch.ops.rope.shapes import (
    ELEMENTS,
    FIRST_HALF,
    HALVES,
    INTERLEAVED,
    PER_PAIR,
    TO_HALVES,
    as_usual,
    shaped_as,
)
from hf_kernel_patch.ops.rope.triton_kernel import IN_HALVES, ONE, SIDE_BY_SIDE, rope_kernel

if TYPE_CHECKING:
    from torch.autograd.function import FunctionCtx

#: The op's ``pairs`` and ``angles`` -> where the pairs of q and k are, of the results, and of the
#: angles. The last of the angles are half as wide as what is rotated.
_WIDE = ONE + 1
_LAYOUTS = {
    (HALVES, ELEMENTS): (IN_HALVES, IN_HALVES, IN_HALVES),
    (HALVES, FIRST_HALF): (IN_HALVES, IN_HALVES, ONE),
    (HALVES, PER_PAIR): (IN_HALVES, IN_HALVES, _WIDE),
    (INTERLEAVED, ELEMENTS): (SIDE_BY_SIDE, SIDE_BY_SIDE, SIDE_BY_SIDE),
    (INTERLEAVED, FIRST_HALF): (SIDE_BY_SIDE, SIDE_BY_SIDE, ONE),
    (INTERLEAVED, PER_PAIR): (SIDE_BY_SIDE, SIDE_BY_SIDE, _WIDE),
    (TO_HALVES, ELEMENTS): (SIDE_BY_SIDE, IN_HALVES, IN_HALVES),
    (TO_HALVES, FIRST_HALF): (SIDE_BY_SIDE, IN_HALVES, ONE),
    (TO_HALVES, PER_PAIR): (SIDE_BY_SIDE, IN_HALVES, _WIDE),
}


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
    return launcher(rope_kernel, static, warps, waits=True), blocks[0], blocks[1]


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
    read: int,
    written: int,
    angles: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k rotated by the angles in one launch, or ``back`` by the transpose of that.

    The last three say where pairs are, as ``_LAYOUTS`` does.
    """
    shape, k_heads = q.shape, k.shape[unsqueeze_dim]
    batch, q_heads, tokens, size = shape
    if unsqueeze_dim == 2:
        q_heads, tokens = tokens, q_heads
    q_out = empty(q, batch, tokens, q_heads, size, unsqueeze_dim, inner_out, q_dtype)
    k_out = empty(q, batch, tokens, k_heads, size, unsqueeze_dim, inner_out, k_dtype)
    if not batch * tokens:
        return q_out, k_out
    q, k = plain_rows(q), plain_rows(k)
    cos, sin, *cos_strides = plain_angles(cos, sin)
    numbers = (*strides(q, unsqueeze_dim), *strides(k, unsqueeze_dim), *cos_strides)
    launch, groups, block = _launcher(
        (q.dtype, k.dtype, q_dtype, k_dtype, cos.dtype, sin.dtype),
        (q_heads, k_heads),
        size,
        cos.shape[2] if angles <= ONE else 2 * cos.shape[2],
        numbers[2] <= numbers[1],
        *(inner_out, back, read, written, min(angles, ONE), unit(*numbers)),
    )
    programs = batch * cdiv(tokens, block) * groups
    launch(programs, (q, k, q_out, k_out, cos, sin), (tokens, *numbers))
    return q_out, k_out


def _fake(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    unsqueeze_dim: int,
    q_dtype: torch.dtype,
    k_dtype: torch.dtype,
    inner_out: bool,
    *rest: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, tokens, size = q.shape[0], q.shape[3 - unsqueeze_dim], q.shape[3]
    q_heads, k_heads = q.shape[unsqueeze_dim], k.shape[unsqueeze_dim]
    return (
        empty(q, batch, tokens, q_heads, size, unsqueeze_dim, inner_out, q_dtype),
        empty(q, batch, tokens, k_heads, size, unsqueeze_dim, inner_out, k_dtype),
    )


def _save(ctx: FunctionCtx, tensors: Any, options: Any, output: Any) -> None:
    """Keep the angles, not q and k, as the map is linear; its transpose is the op itself.

    What that reads lies as the results, what it writes as q.
    """
    q, k, cos, sin = tensors
    unsqueeze_dim, _, _, _, back, read, written, angles = options
    ctx.save_for_backward(cos, sin)
    lie = inner(q, unsqueeze_dim)
    ctx.options = unsqueeze_dim, q.dtype, k.dtype, lie, not back, written, read, angles


def _differentiate(
    ctx: FunctionCtx, grads: Any, needed: Any, backward: Any
) -> tuple[torch.Tensor | None, ...]:
    return backward(*grads, *ctx.saved_tensors, *ctx.options)


_operator, _apply = fused_op(
    "rope",
    "(Tensor q, Tensor k, Tensor cos, Tensor sin, int unsqueeze_dim, ScalarType q_dtype, "
    "ScalarType k_dtype, bool inner_out, bool back, int read, int written, int angles) "
    "-> (Tensor, Tensor)",
    _rotate,
    _fake,
    None,
    save=_save,
    differentiate=_differentiate,
    depends=((0,), (1,)),
)


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

    Arithmetic is in float32 at all times and rounds once. The results are dense and lie in memory
    as q does: the heads of a token side by side, or the tokens of a head. The gradients of q and k
    lie as q.
    """
    if unsqueeze_dim < 1 or q.dim() != 4 or cos.dim() != 3:
        arguments = as_usual(q, k, cos, sin, unsqueeze_dim)
        return shaped_as(q, rope(*arguments, cast, pairs, angles, upcast))
    if k is None:
        none = [0 if dim == unsqueeze_dim else size for dim, size in enumerate(q.shape)]
        out, _ = rope(q, q.new_empty(none), cos, sin, unsqueeze_dim, cast, pairs, angles, upcast)
        return out, None
    q_dtype, k_dtype = q.dtype, k.dtype
    if not cast:
        to = cos.dtype
        if sin.dtype != to:
            to = torch.promote_types(to, sin.dtype)
        q_dtype, k_dtype = torch.promote_types(q_dtype, to), torch.promote_types(k_dtype, to)
    lie = inner(q, unsqueeze_dim)
    options = unsqueeze_dim, q_dtype, k_dtype, lie, False, *_LAYOUTS[pairs, angles]
    if torch.compiler.is_compiling():
        return _operator(q, k, cos, sin, *options)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        return _apply(options, q, k, cos, sin)
    return _rotate(q, k, cos, sin, *options)
