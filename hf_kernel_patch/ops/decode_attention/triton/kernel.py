"""decode_attention in Triton: flash decoding (Dao et al. 2023).

The cache is read once: the query heads of a group go together. Its slots are dealt to several
programs, block by block in turn, so that a few sequences fill the device, too, and so do those
whose mask allows a stretch of slots only. Each program:
1. reads where the cache lies from device memory;
2. takes the new token from the arguments, if that is its, and stores it in the cache;
3. goes through its blocks with the softmax of flash attention;
4. stores its partial result. The last program of a key head combines all of them; where they are
   many, that is a launch of its own, with a program for each head.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from hf_kernel_patch.ops._shared.triton_early import begin
from hf_kernel_patch.ops.decode_attention.triton.combine import LOG2_E, combine


@triton.jit
def _scaled(b_s, scaling, softcap, SOFTCAP: tl.constexpr):
    """Scores from products, times log2(e): exp2 costs less than exp."""
    if SOFTCAP:
        # tanh(x) = 1 - 2 / (1 + exp(2 x)), which neither overflows nor yields NaN.
        e = tl.exp2(b_s * (scaling / softcap * 2.0 * LOG2_E))
        return softcap * LOG2_E * (1.0 - 2.0 / (1.0 + e))
    else:
        return b_s * (scaling * LOG2_E)


@triton.jit
def _stretch(p_mask, split, splits, blocks, cached, BLOCK: tl.constexpr, SCANNED: tl.constexpr):
    """The first of a program's blocks with an allowed slot, and the end after the last."""
    first = blocks
    end = split * 0
    for base in tl.range(split, blocks, splits * SCANNED):
        o_block = base + tl.arange(0, SCANNED) * splits
        o_j = o_block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        allowed = tl.load(p_mask + o_j, o_j < cached, other=0).to(tl.int32)
        some = tl.max(allowed, 1) > 0
        first = tl.minimum(first, tl.min(tl.where(some, o_block, blocks), 0))
        end = tl.maximum(end, tl.max(tl.where(some, o_block + 1, 0), 0))
    return first, end


_NUMBERS = ["splits", "query_batch", "query_head", "key_batch", "key_head", "value_batch"]
_NUMBERS += ["value_head", "mask_batch", "scaling", "softcap"]


@triton.jit(do_not_specialize=_NUMBERS)
def decode_kernel(
    query,  # (B, H, KEY_DIM) by strides
    key,  # (B, HEADS, KEY_DIM) by strides; not read without NEW, as what follows
    value,  # (B, HEADS, VALUE_DIM) by strides
    mask,  # (1 or B, size)
    sinks,  # (H)
    address,  # (4): pointers of keys and values, capacity, start
    position,  # (1)
    counters,  # (B * HEADS), zeros before and after
    partial,  # float32: (B * HEADS, splits, GROUP, VALUE_DIM), then (B * HEADS, splits, GROUP)
    out,  # (B, H, VALUE_DIM), dense
    splits: tl.int64,
    query_batch: tl.int64,  # strides, in units of UNIT
    query_head: tl.int64,
    key_batch: tl.int64,
    key_head: tl.int64,
    value_batch: tl.int64,
    value_head: tl.int64,
    mask_batch: tl.int64,  # in elements
    scaling: tl.float32,
    softcap: tl.float32,
    UNIT: tl.constexpr,
    HEADS: tl.constexpr,  # of keys and values
    GROUP: tl.constexpr,  # heads of the query for each of these
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    NEW: tl.constexpr,  # whether there are key and value
    MASKED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    SPLIT: tl.constexpr,  # whether splits > 1
    COUNT: tl.constexpr,  # whether the last program combines, or another launch
    WIDE: tl.constexpr,  # whether operands of products are float32
    KEY_BLOCK: tl.constexpr,  # powers of 2 that hold KEY_DIM, VALUE_DIM and GROUP
    VALUE_BLOCK: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,  # likewise, 16 at least, which tl.dot takes
    CHUNK: tl.constexpr,
    SCANNED: tl.constexpr,
    BLOCK: tl.constexpr,  # slots
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
):
    begin(EARLY)
    dtype: tl.constexpr = query.dtype.element_ty
    # Divisions in 32 bits, of which there are enough; offsets in 64.
    splits = splits.to(tl.int32)
    row = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    batch = (row // HEADS).to(tl.int64)
    head = (row % HEADS).to(tl.int64)
    row = row.to(tl.int64)
    p_keys = tl.load(address).to(tl.pointer_type(dtype))
    p_values = tl.load(address + 1).to(tl.pointer_type(dtype))
    capacity = tl.load(address + 2)
    slot = (tl.load(position) - tl.load(address + 3)).to(tl.int32)
    active = tl.minimum(slot // BLOCK + 1, splits)
    # Before anything waits for these, the arguments are on their way, too.
    o_g = tl.arange(0, ROWS)
    o_k = tl.arange(0, KEY_BLOCK)
    o_v = tl.arange(0, VALUE_BLOCK)
    m_g = o_g < GROUP
    m_k = o_k < KEY_DIM
    m_v = o_v < VALUE_DIM
    p_query = query + (batch * query_batch + head * GROUP * query_head) * UNIT
    o_query = o_g[:, None] * (query_head * UNIT) + o_k[None, :]
    b_q = tl.load(p_query + o_query, m_g[:, None] & m_k[None, :], other=0.0)
    if NEW:
        p_key = key + (batch * key_batch + head * key_head) * UNIT
        p_value = value + (batch * value_batch + head * value_head) * UNIT
        b_key = tl.load(p_key + o_k, m_k, other=0.0)
        b_value = tl.load(p_value + o_v, m_v, other=0.0)
    if split >= active:
        return

    # Triton takes no such pointer for aligned by itself, and would load element by element.
    p_keys = tl.multiple_of(p_keys, 16) + row * capacity * KEY_DIM
    p_values = tl.multiple_of(p_values, 16) + row * capacity * VALUE_DIM
    p_mask = mask + batch * mask_batch
    if WIDE:
        b_q = b_q.to(tl.float32)
    if NEW:
        # The last block's program takes the new token, as that block is not full.
        mine = slot // BLOCK % splits == split
        tl.store(p_keys + slot.to(tl.int64) * KEY_DIM + o_k, b_key, m_k & mine)
        tl.store(p_values + slot.to(tl.int64) * VALUE_DIM + o_v, b_value, m_v & mine)
        if MASKED:
            mine = mine & (tl.load(p_mask + slot).to(tl.int32) != 0)
        b_score = tl.sum(b_q.to(tl.float32) * b_key.to(tl.float32)[None, :], 1)
        b_m = tl.where(mine, _scaled(b_score, scaling, softcap, SOFTCAP), float("-inf"))
        b_l = tl.where(mine, tl.full([ROWS], 1.0, tl.float32), 0.0)
        b_acc = tl.zeros([ROWS, VALUE_BLOCK], tl.float32)
        b_acc += tl.where(mine, b_value.to(tl.float32), 0.0)[None, :]
        cached = slot
    else:
        b_m = tl.full([ROWS], float("-inf"), tl.float32)
        b_l = tl.zeros([ROWS], tl.float32)
        b_acc = tl.zeros([ROWS, VALUE_BLOCK], tl.float32)
        cached = slot + 1

    blocks = (cached + BLOCK - 1) // BLOCK
    first = split
    end = blocks
    if MASKED:  # noqa: SIM102  (what Triton knows when it compiles, and what it does not)
        if blocks > 2 * splits:  # else a look ahead costs more than blocks that load nothing
            first, end = _stretch(p_mask, split, splits, blocks, cached, BLOCK, SCANNED)
    o_block = tl.arange(0, BLOCK)
    o_keys = o_block[None, :] * KEY_DIM + o_k[:, None]
    o_values = o_block[:, None] * VALUE_DIM + o_v[None, :]
    for block in tl.range(first, end, splits, num_stages=STAGES):
        offset = tl.full([], BLOCK, tl.int64) * block
        o_j = block * BLOCK + o_block
        m_j = o_j < cached
        if MASKED:
            m_j = m_j & (tl.load(p_mask + o_j, m_j, other=0).to(tl.int32) != 0)
        m_keys = m_j[None, :]
        if KEY_DIM != KEY_BLOCK:
            m_keys = m_keys & m_k[:, None]
        b_k = tl.load(p_keys + offset * KEY_DIM + o_keys, m_keys, other=0.0)
        if WIDE:
            b_k = b_k.to(tl.float32)
        b_s = _scaled(tl.dot(b_q, b_k, input_precision="ieee"), scaling, softcap, SOFTCAP)
        b_s = tl.where(m_j[None, :], b_s, float("-inf"))
        m_new = tl.maximum(b_m, tl.max(b_s, 1))
        safe = tl.where(m_new == float("-inf"), 0.0, m_new)  # -inf - -inf would be NaN
        rescale = tl.exp2(b_m - safe)
        b_p = tl.exp2(b_s - safe[:, None])
        b_l = b_l * rescale + tl.sum(b_p, 1)
        m_values = m_j[:, None]
        if VALUE_DIM != VALUE_BLOCK:
            m_values = m_values & m_v[None, :]
        b_v = tl.load(p_values + offset * VALUE_DIM + o_values, m_values, other=0.0)
        if WIDE:
            b_v = b_v.to(tl.float32)
        b_acc = b_acc * rescale[:, None]
        b_acc += tl.dot(b_p.to(b_v.dtype), b_v, input_precision="ieee")
        b_m = m_new

    p_out = out + row * GROUP * VALUE_DIM
    m_out = m_g[:, None] & m_v[None, :]
    o_out = o_g[:, None] * VALUE_DIM + o_v[None, :]
    if SPLIT:
        b_lse = b_m + tl.log2(tl.where(b_l == 0.0, 1.0, b_l))  # -inf where nothing is allowed
        b_part = b_acc / tl.where(b_l == 0.0, 1.0, b_l)[:, None]
        p_part = partial + row * splits * GROUP * VALUE_DIM
        p_lse = partial + tl.num_programs(0).to(tl.int64) * GROUP * VALUE_DIM
        p_lse += row * splits * GROUP
        tl.store(p_part + split * GROUP * VALUE_DIM + o_out, b_part, m_out)
        tl.store(p_lse + split * GROUP + o_g, b_lse, m_g)
        if COUNT:
            tl.debug_barrier()  # all threads' stores come before the count, which one thread makes
            if tl.atomic_add(counters + row, 1) == active - 1:
                tl.store(counters + row, 0)
                combine(
                    p_part, p_lse, sinks + head * GROUP, p_out, active, active,
                    GROUP, GROUP, VALUE_DIM, SINKS, GROUP_BLOCK, VALUE_BLOCK, CHUNK,
                )  # fmt: skip
    else:
        if SINKS:
            b_sink = tl.load(sinks + head * GROUP + o_g, m_g, other=0.0).to(tl.float32) * LOG2_E
            m_new = tl.maximum(b_m, b_sink)
            rescale = tl.exp2(b_m - m_new)
            b_l = b_l * rescale + tl.exp2(b_sink - m_new)
            b_acc = b_acc * rescale[:, None]
        b_out = b_acc / tl.where(b_l == 0.0, 1.0, b_l)[:, None]
        tl.store(p_out + o_out, b_out.to(dtype), m_out)
