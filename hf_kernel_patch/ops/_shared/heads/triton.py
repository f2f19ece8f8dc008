"""What kernels over the heads of q and k share: where a program works, and how rows are read.

A row is the elements of one head at one token; in kernels, rows are (tokens, heads, elements).
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from hf_kernel_patch.ops._shared.launch import cdiv

#: Heads of q and k that one program takes at most, each count rounded up to a power of two.
HEADS = 72
#: Tokens that one program takes, where the tokens of a head are next to each other.
TOKENS = 32


@triton.jit
def block_of(block, tokens, GROUPS: tl.constexpr, BLOCK_T: tl.constexpr):
    """What a block is: its batch, its tokens (T, 1, 1) and its group of heads."""
    token_blocks = tl.cdiv(tokens, BLOCK_T)
    token_block = block // GROUPS
    t = token_block % token_blocks * BLOCK_T + tl.arange(0, BLOCK_T)[:, None, None]
    return (token_block // token_blocks).to(tl.int64), t.to(tl.int64), block % GROUPS


@triton.jit
def rows(batch, t, h, batch_stride, token_stride, head_stride, UNIT: tl.constexpr):
    """Offsets of the rows of a tensor whose strides are multiples of UNIT.

    Dividing by UNIT and multiplying tells Triton so: rows are then aligned, for loads of 16 bytes.
    """
    across = batch * (batch_stride // UNIT * UNIT) + t * (token_stride // UNIT * UNIT)
    return across + h * (head_stride // UNIT * UNIT)


@triton.jit
def heads(group, BLOCK_H: tl.constexpr):
    """The heads (1, H, 1) of a group."""
    return (group * BLOCK_H + tl.arange(0, BLOCK_H)[None, :, None]).to(tl.int64)


@triton.jit
def dense(batch, t, h, tokens, HEADS: tl.constexpr, D: tl.constexpr, INNER: tl.constexpr):
    """Offsets of the rows of a dense tensor, its heads inside of its tokens in memory or not."""
    if INNER:
        return ((batch * tokens + t) * HEADS + h) * D
    else:
        return ((batch * HEADS + h) * tokens + t) * D


@triton.jit
def load_halves(x, mask, R: tl.constexpr, HALF: tl.constexpr):
    """Both halves (.., HALF) of the first R elements of rows, in float32."""
    c = tl.arange(0, HALF)[None, None, :]
    mask = mask & (c < R // 2)
    first = tl.load(x + c, mask, 0.0).to(tl.float32)
    return first, tl.load(x + c + R // 2, mask, 0.0).to(tl.float32)


@triton.jit
def load(x, mask, D: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr, TAIL: tl.constexpr):
    """Rows of D elements in float32: two halves of R elements and the tail (.., TAIL), if any."""
    x1, x2 = load_halves(x, mask, R, HALF)
    if R < D:
        c = R + tl.arange(0, TAIL)[None, None, :]
        x3 = tl.load(x + c, mask & (c < D), 0.0).to(tl.float32)
    else:
        x3 = tl.zeros([1, 1, 1], tl.float32)
    return x1, x2, x3


@triton.jit
def store(
    out, y1, y2, y3, mask, D: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr, TAIL: tl.constexpr
):
    """The converse of ``load``."""
    c = tl.arange(0, HALF)[None, None, :]
    half = mask & (c < R // 2)
    tl.store(out + c, y1.to(out.dtype.element_ty), half)
    tl.store(out + c + R // 2, y2.to(out.dtype.element_ty), half)
    if R < D:
        c = R + tl.arange(0, TAIL)[None, None, :]
        tl.store(out + c, y3.to(out.dtype.element_ty), mask & (c < D))


@triton.jit
def rotated(x1, x2, cos1, cos2, sin1, sin2, BACK: tl.constexpr):
    """Two halves rotated by the angles, or by the transpose of that."""
    if BACK:
        return x1 * cos1 + x2 * sin2, x2 * cos2 - x1 * sin1
    else:
        return x1 * cos1 - x2 * sin1, x2 * cos2 + x1 * sin2


@cache
def tile(
    q_heads: int, k_heads: int, size: int, inner: bool, most: int = HEADS
) -> tuple[int, int, int, int, int]:
    """GROUPS, BLOCK_T, BLOCK_Q and BLOCK_K of a launch, and its warps.

    A program takes all heads of a token, if they are no more than ``most``, or some tokens of one
    head where those are neighbours. The warps are four at least, and as many as make cos and sin
    of a token one element a thread at most: Triton then loads them in the layout of q; otherwise
    it moves them there through shared memory.
    """
    groups = 1 if inner else max(q_heads, k_heads)
    while True:
        q_block, k_block = (power(cdiv(heads, groups)) for heads in (q_heads, k_heads))
        if q_block + k_block <= max(2, most):
            break
        groups += 1
    return groups, 1 if inner else TOKENS, q_block, k_block, max(4, power(size // 2) // 16)


def power(size: int) -> int:
    """The power of two that holds ``size`` elements; 1 for none."""
    return int(triton.next_power_of_2(max(1, size)))


def strides(x: torch.Tensor, unsqueeze_dim: int) -> tuple[int, int, int]:
    """Of the batches, tokens and heads of q or k."""
    batch, first, second, _ = x.stride()
    return (batch, second, first) if unsqueeze_dim == 1 else (batch, first, second)


def inner(x: torch.Tensor, unsqueeze_dim: int) -> bool:
    """Whether the heads of a token are next to each other in memory."""
    _, token, head = strides(x, unsqueeze_dim)
    return bool(head <= token)


def unit(*numbers: int) -> int:
    """8 where that divides every stride, so that the kernel knows rows to be aligned, else 1."""
    found = 0
    for number in numbers:
        found |= number
    return 1 if found & 7 else 8


def empty(
    like: torch.Tensor,
    batch: int,
    tokens: int,
    heads: int,
    size: int,
    unsqueeze_dim: int,
    inner: bool,
    dtype: torch.dtype,
) -> torch.Tensor:
    """A new tensor on ``like``'s device whose heads are its dimension ``unsqueeze_dim``.

    In memory the heads of a token are next to each other, or the tokens of a head.
    """
    token, head = (heads * size, size) if inner else (size, tokens * size)
    if unsqueeze_dim == 1:
        shape, strides_out = (batch, heads, tokens, size), (heads * tokens * size, head, token, 1)
    else:
        shape, strides_out = (batch, tokens, heads, size), (heads * tokens * size, token, head, 1)
    return like.new_empty_strided(shape, strides_out, dtype=dtype)


def plain_rows(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy of it where the elements of a row are not neighbours."""
    return x if x.stride(-1) == 1 else x.contiguous()


def plain_angles(
    cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    """cos and sin with contiguous rows and equal strides; their strides of batch and token."""
    batch, token, one = cos.stride()
    if one != 1 or sin.stride() != (batch, token, one):
        cos, sin = cos.contiguous(), sin.contiguous()
        batch, token, _ = cos.stride()
    return cos, sin, batch if cos.shape[0] > 1 else 0, token if cos.shape[1] > 1 else 0
