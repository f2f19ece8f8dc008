"""qk_norm_rope by the kernels of ``triton.py``: launches, operator and autograd."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from hf_kernel_patch.ops._shared.fused import Backward, fused_op
from hf_kernel_patch.ops._shared.heads.triton import (
    empty,
    plain_angles,
    plain_rows,
    power,
    strides,
    tile,
    unit,
)
from hf_kernel_patch.ops._shared.launch import (
    Launch,
    cdiv,
    launcher,
    processors,
    programs_for,
    shared_memory,
)
from hf_kernel_patch.ops.qk_norm_rope import reference
from hf_kernel_patch.ops.qk_norm_rope.triton import backward_kernel, forward_kernel, sum_kernel
from hf_kernel_patch.ops.rope.shapes import ELEMENTS, FIRST_HALF, HALVES, INTERLEAVED
from hf_kernel_patch.ops.rope.triton_kernel import IN_HALVES, ONE, SIDE_BY_SIDE

#: Of the backward: heads of q and k that one program takes at most (what it keeps of each fills
#: the registers), warps on each multiprocessor, and the stages of the loops' pipelines.
HEADS_BACKWARD = 36
RESIDENT = 12
STAGES = 3
#: Of the sum of the weights' gradients: columns of a program, and rows at a time.
SUM_COLUMNS = 32
SUM_ROWS = 64

_TENSORS = "Tensor q, Tensor k, Tensor q_weight, Tensor k_weight"
_ANGLES = "Tensor cos, Tensor sin"
_OPTIONS = "int unsqueeze_dim, float offset, bool cast_first"
_LAST = "bool cast=False, int pairs=0, int angles=0"
#: The op's ``pairs`` and ``angles`` -> where the pairs of q and k are, and of the angles.
_PAIRS_AND_ANGLES = {
    (HALVES, ELEMENTS): (IN_HALVES, IN_HALVES),
    (HALVES, FIRST_HALF): (IN_HALVES, ONE),
    (INTERLEAVED, ELEMENTS): (SIDE_BY_SIDE, SIDE_BY_SIDE),
    (INTERLEAVED, FIRST_HALF): (SIDE_BY_SIDE, ONE),
}


@cache
def _launcher(
    dtypes: tuple[torch.dtype, ...],
    heads: tuple[int, int],
    size: int,
    width: int,
    *options: Any,
) -> tuple[Launch, int]:
    """What launches forward, with the kernel's last arguments, and the groups of the heads."""
    groups, _, *blocks, warps = tile(*heads, size, True)
    static = (*heads, size, width, groups, *blocks, power(width // 2), power(size - width))
    return launcher(forward_kernel, (*static, *options), warps, waits=True), groups


@cache
def _backward_launcher(
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
    heads: tuple[int, int],
    size: int,
    width: int,
    *options: Any,
) -> tuple[Launch, int, int]:
    """What launches backward, the groups that heads come in, and the most programs."""
    most = HEADS_BACKWARD if width == size else HEADS_BACKWARD // 2
    groups, _, *blocks, warps = tile(*heads, size, True, most)
    static = (*heads, size, width, groups, *blocks, power(width // 2), power(size - width))
    # A stage holds the rows of q, k and their gradients.
    stage = 2 * sum(blocks) * power(size) * max(dtype.itemsize for dtype in dtypes[:4])
    stages = STAGES if (STAGES - 1) * stage + 4096 <= shared_memory(device) else 1
    launch = launcher(backward_kernel, (*static, *options, stages), warps, stages)
    return launch, groups, processors(device) * max(1, RESIDENT // warps)


@cache
def _sum_launcher(dtypes: tuple[torch.dtype, ...], size: int) -> Launch:
    return launcher(sum_kernel, (size, SUM_COLUMNS, SUM_ROWS), 4)


def _results(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    unsqueeze_dim: int,
    offset: float,
    cast_first: bool,
    cast: bool,
    pairs: int,
    angles: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """New tensors for the results, the heads of a token next to each other in memory."""
    batch, tokens, q_heads, size = q.shape
    q_dtype, k_dtype = q.dtype, k.dtype
    if cast_first:
        q_dtype = torch.promote_types(q_dtype, q_weight.dtype)
        k_dtype = torch.promote_types(k_dtype, k_weight.dtype)
    if not cast:
        q_dtype, k_dtype = (torch.promote_types(dtype, cos.dtype) for dtype in (q_dtype, k_dtype))
    return (
        empty(q, batch, tokens, q_heads, size, unsqueeze_dim, True, q_dtype),
        empty(q, batch, tokens, k.shape[2], size, unsqueeze_dim, True, k_dtype),
    )


def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    unsqueeze_dim: int,
    offset: float,
    cast_first: bool,
    cast: bool,
    pairs: int,
    angles: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    options = unsqueeze_dim, offset, cast_first, cast, pairs, angles
    q_out, k_out = _results(q, k, q_weight, k_weight, cos, sin, eps, *options)
    batch, tokens, q_heads, size = q.shape
    if not batch * tokens:
        return q_out, k_out
    q, k = plain_rows(q), plain_rows(k)
    cos, sin, *cos_strides = plain_angles(cos, sin)
    numbers = (*strides(q, 2), *strides(k, 2), *cos_strides)
    tensors = q, k, q_weight.contiguous(), k_weight.contiguous(), cos, sin, q_out, k_out
    launch, groups = _launcher(
        tuple(tensor.dtype for tensor in tensors),
        (q_heads, k.shape[2]),
        *(size, cos.shape[2], pairs, angles, unit(*numbers)),
        *(eps, 0.0 if cast_first else offset, cast_first),
    )
    launch(batch * tokens * groups, tensors, (tokens, *numbers))
    return q_out, k_out


def _gradients(
    q: torch.Tensor, k: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """New tensors for the gradients."""
    leaves = q, k, q_weight, k_weight
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in leaves)


def _backward(
    grad_q: torch.Tensor,
    grad_k: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    unsqueeze_dim: int,
    offset: float,
    cast_first: bool,
    cast: bool,
    pairs: int,
    angles: int,
    needed: Sequence[bool],
) -> tuple[torch.Tensor, ...]:
    """Gradients of q and k, dense, and of their weights, which are zeros if neither is needed."""
    weights = needed[2] or needed[3]
    dq, dk, q_grad, k_grad = found = _gradients(q, k, q_weight, k_weight)
    batch, tokens, q_heads, size = q.shape
    if not weights or not batch * tokens:
        q_grad.zero_()
        k_grad.zero_()
    if not batch * tokens:
        return found
    q, k, grad_q, grad_k = (plain_rows(x) for x in (q, k, grad_q, grad_k))
    cos, sin, *cos_strides = plain_angles(cos, sin)
    steps = *strides(grad_q, unsqueeze_dim), *strides(grad_k, unsqueeze_dim)
    numbers = *strides(q, 2), *strides(k, 2), *steps, *cos_strides
    leaves = q, k, grad_q, grad_k, q_weight.contiguous(), k_weight.contiguous()
    launch, groups, most = _backward_launcher(
        tuple(tensor.dtype for tensor in (*leaves, cos, sin)),
        q.device,
        (q_heads, k.shape[2]),
        *(size, cos.shape[2], pairs, angles, unit(*numbers)),
        *(eps, 0.0 if cast_first else offset, weights),
    )
    blocks = batch * tokens * groups
    programs = programs_for(blocks, most)
    partial_dw = q.new_empty((programs if weights else 0, 2, size), dtype=torch.float32)
    tensors = *leaves, cos, sin, dq, dk, partial_dw
    launch(programs, tensors, (blocks, tokens, *numbers))
    if weights:
        add = _sum_launcher((q_grad.dtype, k_grad.dtype), size)
        add(cdiv(2 * size, SUM_COLUMNS), (partial_dw, q_grad, k_grad), (programs,))
    return found


def _plain(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    *rest: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    *options, pairs, angles = rest
    named = next(names for names, places in _PAIRS_AND_ANGLES.items() if places == (pairs, angles))
    arguments: Any = q, k, q_weight, k_weight, eps, cos, sin, *options, False, *named
    return reference.qk_norm_rope(*arguments)


_operator, _apply = fused_op(
    "qk_norm_rope",
    f"({_TENSORS}, float eps, {_ANGLES}, {_OPTIONS}, {_LAST}) -> (Tensor, Tensor)",
    _forward,
    _results,
    Backward(
        f"(Tensor grad_q, Tensor grad_k, {_TENSORS}, {_ANGLES}, float eps, {_OPTIONS}, "
        "bool cast, int pairs, int angles, bool[] needed) -> (Tensor, Tensor, Tensor, Tensor)",
        _backward,
        lambda *inputs: _gradients(*inputs[2:6]),
        _plain,
    ),
    depends=((0, 2), (1, 3)),
)


def qk_norm_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    unsqueeze_dim: int = 1,
    offset: float = 0.0,
    cast_first: bool = True,
    cast: bool = False,
    upcast: bool = False,
    pairs: str = HALVES,
    angles: str = ELEMENTS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`hf_kernel_patch.ops.qk_norm_rope.reference.qk_norm_rope`.

    Arithmetic is in float32, with or without ``upcast``; the norm rounds where the original does
    and the rotation once. The results are dense, the heads of a token side by side in memory.
    """
    options = unsqueeze_dim, offset, cast_first, cast, *_PAIRS_AND_ANGLES[pairs, angles]
    if torch.compiler.is_compiling():
        return _operator(q, k, q_weight, k_weight, eps, cos, sin, *options)
    tracked = q.requires_grad or k.requires_grad or q_weight.requires_grad or k_weight.requires_grad
    if tracked and torch.is_grad_enabled():
        return _apply((eps, *options), q, k, q_weight, k_weight, cos, sin)
    return _forward(q, k, q_weight, k_weight, cos, sin, eps, *options)
