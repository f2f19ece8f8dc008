"""Which pairs of token and expert come first: a counting sort by expert, the same at every run.

Two launches, one for a few hundred pairs, without atomic operations or a word to the host.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from hf_kernel_patch.ops.launch import Launch, launcher

#: Pairs that a program sorts: the least of these that holds all, or the last.
BLOCKS = (32, 128, 512)
#: How many of them it compares with all others at a time.
CHUNK = 32
#: Blocks whose counts a program adds at a time.
COUNTS = 64


class Plan(NamedTuple):
    """The rows, which are the pairs sorted by expert, and the tiles that cover them.

    Pairs are numbered token * top + slot. Those of no expert here have no row; rows after the last
    one are not written.
    """

    pairs: torch.Tensor  #: (P,) int32, the pair of each row
    rows: torch.Tensor  #: (P,) int32, the row of each pair, -1 where it has none
    ends: torch.Tensor  #: (E,) int32, the row after each expert's last one
    tiles: (
        torch.Tensor
    )  #: (2 * most + 1,) int32: experts, first rows, then how many tiles there are
    most: int  #: tiles there may be
    block: int  #: rows of a tile


@triton.jit
def _experts(index, i, n, E: tl.constexpr):
    """The experts of pairs i; E for those of no expert here and for pairs there are not."""
    expert = tl.load(index + i, i < n, E)
    return tl.where((expert < 0) | (expert > E), E, expert).to(tl.int32)


@triton.jit(do_not_specialize=["n"])
def _count_kernel(
    index,  # (n,) experts
    counts,  # (blocks, SLOTS) int32
    n: tl.int32,
    E: tl.constexpr,
    SLOTS: tl.constexpr,  # a power of two, E at least
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    expert = _experts(index, block * BLOCK + tl.arange(0, BLOCK), n, E)
    count = tl.histogram(expert, SLOTS, expert < E)
    tl.store(counts + block * SLOTS + tl.arange(0, SLOTS), count)


@triton.jit(do_not_specialize=["n", "blocks", "most"])
def _sort_kernel(
    index,  # (n,) experts
    counts,  # (blocks, SLOTS) int32; not read where there is ONE block
    pairs,
    rows,
    ends,
    tiles,
    n: tl.int32,
    blocks: tl.int32,
    most: tl.int32,
    E: tl.constexpr,
    SLOTS: tl.constexpr,
    TILE: tl.constexpr,  # rows of a tile
    ONE: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    COUNTS: tl.constexpr,
):
    block = tl.program_id(0)
    slot = tl.arange(0, SLOTS)
    pair = block * BLOCK + tl.arange(0, BLOCK)
    expert = _experts(index, pair, n, E)
    if ONE:
        total = tl.histogram(expert, SLOTS, expert < E)
        before = tl.zeros((SLOTS,), tl.int32)
    else:
        alls = tl.zeros((COUNTS, SLOTS), tl.int32)
        earlier = tl.zeros((COUNTS, SLOTS), tl.int32)
        for first in range(0, blocks, COUNTS):
            row = first + tl.arange(0, COUNTS)[:, None]
            count = tl.load(counts + row * SLOTS + slot[None, :], row < blocks, 0)
            alls += count
            earlier += tl.where(row < block, count, 0)
        total, before = tl.sum(alls, 0), tl.sum(earlier, 0)
    end = tl.cumsum(total, 0)
    start = end - total

    same = tl.zeros((BLOCK, CHUNK), tl.int32)  # earlier pairs of this block with the same expert
    for first in range(0, BLOCK, CHUNK):
        other = block * BLOCK + first + tl.arange(0, CHUNK)
        alike = expert[:, None] == _experts(index, other, n, E)[None, :]
        same += (alike & (other[None, :] < pair[:, None])).to(tl.int32)
    row = tl.gather(start + before, tl.minimum(expert, E - 1), 0) + tl.sum(same, 1)
    here = (expert < E) & (pair < n)
    tl.store(pairs + row, pair, here)
    tl.store(rows + pair, tl.where(here, row, -1), pair < n)

    covering = (total + (TILE - 1)) // TILE
    last = tl.cumsum(covering, 0)
    if block == 0:
        tl.store(ends + slot, end, slot < E)
        tl.store(tiles + 2 * most, tl.max(last, 0))
    for tile in range(block, tl.max(covering, 0), blocks):
        place = tiles + last - covering + tile
        tl.store(place, slot, tile < covering)
        tl.store(place + most, start + tile * TILE, tile < covering)


@cache
def _launchers(
    dtype: torch.dtype, experts: int, tile: int, block: int, one: bool
) -> tuple[Launch, Launch]:
    slots = _slots(experts)
    warps = block // 32
    count = launcher(_count_kernel, (experts, slots, block), warps)
    static = (experts, slots, tile, one, block, min(block, CHUNK), COUNTS)
    return count, launcher(_sort_kernel, static, warps)


def _slots(experts: int) -> int:
    """Experts that a program counts: a power of two, and as many as a warp has threads at least."""
    return max(32, triton.next_power_of_2(experts))


def most_tiles(pairs: int, experts: int, block: int) -> int:
    """How many tiles of ``block`` rows may be needed."""
    held = min(pairs, experts)
    return (pairs + held * (block - 1)) // block


def plan(index: torch.Tensor, experts: int, block: int) -> Plan:
    """Sort the pairs of ``index`` (T, K), int64 or int32, of which there is one at least."""
    index = index.contiguous()
    n = index.numel()
    block_size = next((size for size in BLOCKS if n <= size), BLOCKS[-1])
    blocks = -(-n // block_size)
    slots = _slots(experts)
    most = most_tiles(n, experts, block)
    sizes = [n, n, experts, 2 * most + 1, blocks * slots]
    # One allocation; its parts start at multiples of 16 bytes.
    places = [-(-size // 4) * 4 for size in sizes]
    parts: Any = torch.empty(sum(places), dtype=torch.int32, device=index.device).split(places)
    pairs, rows, ends, tiles, counts = (part[:size] for part, size in zip(parts, sizes))
    count, sort = _launchers(index.dtype, experts, block, block_size, blocks == 1)
    if blocks > 1:
        count(blocks, (index, counts), (n,))
    sort(blocks, (index, counts, pairs, rows, ends, tiles), (n, blocks, most))
    return Plan(pairs, rows, ends, tiles, most, block)
