"""The routing in Triton: a stable counting sort of the pairs of token and expert by expert.

1. Every program counts the experts of a block of pairs (``_count_kernel``).
2. Every program adds up the counts of all blocks: where each expert's rows begin, and how many of
   them earlier blocks fill (from here on ``_sort_kernel``).
3. It ranks its own pairs among those of the same expert, which gives their rows.
4. It writes some of the tiles that cover the rows; the first program writes where rows end, too.

Two launches, or one where a block holds all pairs. There are no atomic operations, so that the
order is the same at every run, and nothing waits for the device.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from hf_kernel_patch.ops._shared.launch import Launch, cdiv, launcher

#: Pairs that a program sorts: the least of these that holds all, or the last.
BLOCKS = (32, 128, 512)
#: How many of them it compares with all others at a time.
CHUNK = 32
#: Blocks whose counts a program adds at a time.
COUNTS = 64


class Routing(NamedTuple):
    """The rows, which are the pairs sorted by expert, and the tiles that cover them.

    Pairs are numbered token * top + slot. Those of no expert here have no row; rows after the last
    one are not written.
    """

    pairs: torch.Tensor  #: (P,) int32, the pair of each row
    rows: torch.Tensor  #: (P,) int32, the row of each pair, -1 where it has none
    ends: torch.Tensor  #: (E,) int32, the row after each expert's last one
    #: (2 * max_tiles + 1,) int32: each tile's expert, each tile's first row, the number of tiles
    tiles: torch.Tensor
    max_tiles: int  #: how many tiles there may be
    block: int  #: rows of a tile


@triton.jit
def _load_experts(index, o_pair, n, E: tl.constexpr):
    """The experts of pairs; E for those of no expert here and for pairs there are not."""
    expert = tl.load(index + o_pair, o_pair < n, E)
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
    expert = _load_experts(index, block * BLOCK + tl.arange(0, BLOCK), n, E)
    count = tl.histogram(expert, SLOTS, expert < E)
    tl.store(counts + block * SLOTS + tl.arange(0, SLOTS), count)


@triton.jit(do_not_specialize=["n", "blocks", "max_tiles"])
def _sort_kernel(
    index,  # (n,) experts
    counts,  # (blocks, SLOTS) int32; not read where there is ONE_BLOCK
    pairs,
    rows,
    ends,
    tiles,
    n: tl.int32,
    blocks: tl.int32,
    max_tiles: tl.int32,
    E: tl.constexpr,
    SLOTS: tl.constexpr,
    TILE: tl.constexpr,  # rows of a tile
    ONE_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    COUNTS: tl.constexpr,
):
    block = tl.program_id(0)
    o_slot = tl.arange(0, SLOTS)  # an expert each
    o_pair = block * BLOCK + tl.arange(0, BLOCK)
    expert = _load_experts(index, o_pair, n, E)

    # 2. Rows of every expert, and those of them that belong to earlier blocks.
    if ONE_BLOCK:
        total = tl.histogram(expert, SLOTS, expert < E)
        before = tl.zeros((SLOTS,), tl.int32)
    else:
        # Added up elementwise: one reduction at the end instead of one at every step.
        b_total = tl.zeros((COUNTS, SLOTS), tl.int32)
        b_before = tl.zeros((COUNTS, SLOTS), tl.int32)
        for first in range(0, blocks, COUNTS):
            o_block = first + tl.arange(0, COUNTS)[:, None]
            count = tl.load(counts + o_block * SLOTS + o_slot[None, :], o_block < blocks, 0)
            b_total += count
            b_before += tl.where(o_block < block, count, 0)
        total, before = tl.sum(b_total, 0), tl.sum(b_before, 0)
    end = tl.cumsum(total, 0)
    start = end - total

    # 3. Earlier pairs of this block with the same expert; all comparisons, some columns at a time.
    b_rank = tl.zeros((BLOCK, CHUNK), tl.int32)
    for first in range(0, BLOCK, CHUNK):
        o_other = block * BLOCK + first + tl.arange(0, CHUNK)
        same = expert[:, None] == _load_experts(index, o_other, n, E)[None, :]
        b_rank += (same & (o_other[None, :] < o_pair[:, None])).to(tl.int32)
    row = tl.gather(start + before, tl.minimum(expert, E - 1), 0) + tl.sum(b_rank, 1)
    m_row = (expert < E) & (o_pair < n)
    tl.store(pairs + row, o_pair, m_row)
    tl.store(rows + o_pair, tl.where(m_row, row, -1), o_pair < n)

    # 4. Block b writes every expert's tiles b, b + blocks and so on.
    tiles_of = (total + (TILE - 1)) // TILE
    last = tl.cumsum(tiles_of, 0)
    if block == 0:
        tl.store(ends + o_slot, end, o_slot < E)
        tl.store(tiles + 2 * max_tiles, tl.max(last, 0))
    for tile in range(block, tl.max(tiles_of, 0), blocks):
        p_tile = tiles + last - tiles_of + tile
        tl.store(p_tile, o_slot, tile < tiles_of)
        tl.store(p_tile + max_tiles, start + tile * TILE, tile < tiles_of)


@cache
def _launchers(
    dtype: torch.dtype, experts: int, tile: int, block: int, one_block: bool
) -> tuple[Launch, Launch]:
    slots = _slots(experts)
    warps = block // 32
    count = launcher(_count_kernel, (experts, slots, block), warps)
    static = (experts, slots, tile, one_block, block, min(block, CHUNK), COUNTS)
    return count, launcher(_sort_kernel, static, warps)


def _slots(experts: int) -> int:
    """Experts that a program counts: a power of two, and as many as a warp has threads at least."""
    return max(32, triton.next_power_of_2(experts))


def most_tiles(pairs: int, experts: int, block: int) -> int:
    """How many tiles of ``block`` rows may be needed: every expert with a row may begin one."""
    with_rows = min(pairs, experts)
    return (pairs + with_rows * (block - 1)) // block


def route(index: torch.Tensor, experts: int, block: int) -> Routing:
    """Sort the pairs of ``index`` (T, K), int64 or int32, of which there is one at least."""
    index = index.contiguous()
    n = index.numel()
    block_size = next((size for size in BLOCKS if n <= size), BLOCKS[-1])
    blocks = cdiv(n, block_size)
    max_tiles = most_tiles(n, experts, block)
    sizes = [n, n, experts, 2 * max_tiles + 1, blocks * _slots(experts)]
    # One allocation; its parts start at multiples of 16 bytes.
    spaces = [cdiv(size, 4) * 4 for size in sizes]
    parts: Any = torch.empty(sum(spaces), dtype=torch.int32, device=index.device).split(spaces)
    pairs, rows, ends, tiles, counts = (part[:size] for part, size in zip(parts, sizes))
    count, sort = _launchers(index.dtype, experts, block, block_size, blocks == 1)
    if blocks > 1:
        count(blocks, (index, counts), (n,))
    sort(blocks, (index, counts, pairs, rows, ends, tiles), (n, blocks, max_tiles))
    return Routing(pairs, rows, ends, tiles, max_tiles, block)
