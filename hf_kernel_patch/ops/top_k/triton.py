"""torch.topk of rows that one program holds, for the few rows that a decoded token has.

A program takes a row: 1. load it; 2. k times, find the largest that is not taken yet, the first
among equals, and store it. PyTorch needs two launches for it, a selection and a sort.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from hf_kernel_patch.ops._shared.launch import Launch, launcher
from hf_kernel_patch.ops._shared.triton_early import begin

#: The most rows, columns and k for which it is the faster.
ROWS, COLUMNS, MOST = 128, 512, 16


@triton.jit(do_not_specialize=["stride"])
def top_k_kernel(
    x,  # (rows, N) by a stride
    values,  # (rows, K), dense
    indices,  # (rows, K), dense
    stride: tl.int64,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    begin(EARLY)
    row = tl.program_id(0).to(tl.int64)
    o_n = tl.arange(0, BLOCK)
    left = o_n < N
    b_x = tl.load(x + row * stride + o_n, left, 0.0)
    # NaN counts as the largest, as in torch.topk.
    b_key = b_x.to(tl.float32)
    b_key = tl.where(b_key != b_key, float("inf"), b_key)
    for i in tl.static_range(K):
        best = tl.max(tl.where(left, b_key, float("-inf")), 0)
        at = tl.min(tl.where(left & (b_key == best), o_n, BLOCK), 0)
        tl.store(values + row * K + i, tl.sum(tl.where(o_n == at, b_x, 0.0), 0))
        tl.store(indices + row * K + i, at.to(tl.int64))
        left = left & (o_n != at)


@cache
def _launcher(dtype: torch.dtype, n: int, k: int) -> Launch:
    return launcher(top_k_kernel, (n, k, triton.next_power_of_2(n)), 1, waits=True)


def fits(x: torch.Tensor, k: int) -> bool:
    """Whether :func:`top_k` takes a tensor (..., N) and is the faster for it."""
    n = x.shape[-1]
    return (
        x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and 0 < k <= min(n, MOST)
        and n <= COLUMNS
        and 0 < x.numel() // n <= ROWS
    )


def top_k(x: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of each row of x (..., N), largest first, and their indices (int64).

    As ``torch.topk(x, k)``, which does not say which of equals it takes; here it is the first.
    """
    rows = x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    values = torch.empty((*x.shape[:-1], k), dtype=x.dtype, device=x.device)
    indices = torch.empty(values.shape, dtype=torch.int64, device=x.device)
    launch = _launcher(x.dtype, x.shape[-1], k)
    launch(len(rows), (rows, values, indices), (rows.stride(0),))
    return values, indices
