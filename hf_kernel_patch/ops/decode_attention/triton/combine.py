"""One softmax from those over the slots of several programs."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from hf_kernel_patch.ops._shared.triton_early import begin

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def combine(
    p_part,  # (splits, GROUP, VALUE_DIM): outputs of the programs
    p_lse,  # (splits, GROUP): log2 of their softmax's denominators, -inf for no slot
    p_sinks,  # (HEADS)
    p_out,  # (HEADS, VALUE_DIM)
    splits,
    active,  # how many of them have stored something
    HEADS: tl.constexpr,  # to combine, of a group
    GROUP: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    SINKS: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,  # splits at a time
):
    o_h = tl.arange(0, HEADS_BLOCK)
    o_v = tl.arange(0, VALUE_BLOCK)
    m_h = o_h < HEADS
    m_v = o_v < VALUE_DIM
    b_m = tl.full([HEADS_BLOCK], float("-inf"), tl.float32)
    b_l = tl.zeros([HEADS_BLOCK], tl.float32)
    if SINKS:
        b_m = tl.load(p_sinks + o_h, m_h, other=0.0).to(tl.float32) * LOG2_E
        b_l += 1.0
    b_acc = tl.zeros([HEADS_BLOCK, VALUE_BLOCK], tl.float32)
    for base in tl.range(0, splits, CHUNK):
        o_s = base + tl.arange(0, CHUNK)
        o_row = o_s[:, None] * GROUP + o_h[None, :]
        m_row = (o_s < splits)[:, None] & m_h[None, :]
        m_part = m_row[:, :, None] & m_v[None, None, :]
        # Around the L1 cache, which other multiprocessors' stores do not reach.
        b_lse = tl.load(p_lse + o_row, m_row, other=0.0, cache_modifier=".cg")
        o_part = o_row[:, :, None] * VALUE_DIM + o_v[None, None, :]
        b_part = tl.load(p_part + o_part, m_part, other=0.0, cache_modifier=".cg")
        # After the loads, which so need not wait for the number of the active.
        m_active = o_s < active
        b_lse = tl.where(m_active[:, None] & m_h[None, :], b_lse, float("-inf"))
        b_part = tl.where(m_active[:, None, None], b_part, 0.0)
        m_new = tl.maximum(b_m, tl.max(b_lse, 0))
        safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        rescale = tl.exp2(b_m - safe)
        weight = tl.exp2(b_lse - safe[None, :])
        b_l = b_l * rescale + tl.sum(weight, 0)
        b_acc = b_acc * rescale[:, None] + tl.sum(weight[:, :, None] * b_part, 0)
        b_m = m_new
    b_out = b_acc / tl.where(b_l == 0.0, 1.0, b_l)[:, None]
    p = p_out + o_h[:, None] * VALUE_DIM + o_v[None, :]
    tl.store(p, b_out.to(p_out.dtype.element_ty), m_h[:, None] & m_v[None, :])


@triton.jit(do_not_specialize=["splits"])
def combine_kernel(
    sinks,  # (H)
    address,  # (4): the last is the cache's start
    position,  # (1)
    partial,  # float32: (B * HEADS, splits, GROUP, VALUE_DIM), then (B * HEADS, splits, GROUP)
    out,  # (B, H, VALUE_DIM), dense
    splits: tl.int64,
    HEADS: tl.constexpr,  # of keys and values
    GROUP: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    SINKS: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,  # slots, as decode_kernel has it
    EARLY: tl.constexpr,
):
    """A program for each head."""
    begin(EARLY)
    slot = (tl.load(position) - tl.load(address + 3)).to(tl.int32)
    pid = tl.program_id(0)
    row = (pid // GROUP).to(tl.int64)
    member = pid % GROUP
    programs = (tl.num_programs(0) // GROUP).to(tl.int64) * splits  # that decode_kernel had
    splits = splits.to(tl.int32)
    active = tl.minimum(slot // BLOCK + 1, splits)
    p_part = partial + (row * splits * GROUP + member) * VALUE_DIM
    p_lse = partial + programs * GROUP * VALUE_DIM + row * splits * GROUP + member
    p_sinks = sinks + pid % (HEADS * GROUP)
    p_out = out + pid.to(tl.int64) * VALUE_DIM
    combine(
        p_part, p_lse, p_sinks, p_out, splits, active,
        1, GROUP, VALUE_DIM, SINKS, 1, VALUE_BLOCK, CHUNK,
    )  # fmt: skip
