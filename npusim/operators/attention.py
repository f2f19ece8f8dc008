"""Attention of (batch, heads, length, size) tensors: what F.scaled_dot_product_attention calls."""

from __future__ import annotations

import torch

from . import operator

_LEFT_UP_CAUSAL = 2


def _weights(
    query: torch.Tensor,
    key: torch.Tensor,
    atten_mask: torch.Tensor | None,
    scale: float,
    sparse_mode: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Softmax over the keys, with its maximum and sum, in float32; rows all masked are zeros.

    True in the mask hides a key. Keys may have fewer heads than queries.
    """
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = query.float() @ key.float().mT * scale
    if sparse_mode == _LEFT_UP_CAUSAL:  # the mask that comes with it is a template
        atten_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    elif sparse_mode != 0:
        raise NotImplementedError(f"npusim: npu_fusion_attention_v3 with sparse_mode={sparse_mode}")
    if atten_mask is not None:
        scores = scores.masked_fill(atten_mask.bool(), float("-inf"))
    largest = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
    weights = (scores - largest).exp()
    total = weights.sum(-1, keepdim=True)
    return weights / total.where(total > 0, torch.ones(())), largest, total


def _only_bnsd(input_layout: str) -> None:
    if input_layout != "BNSD":
        raise NotImplementedError(f"npusim: npu_fusion_attention_v3 of {input_layout}")


@operator("npu_fusion_attention_v3")
def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    head_num: int,
    input_layout: str,
    atten_mask: torch.Tensor | None,
    scale: float,
    next_tockens: int,
    inner_precise: int,
    sparse_mode: int,
) -> tuple[torch.Tensor, ...]:
    """The output; the softmax's maximum and sum, eight times over; three unused outputs."""
    _only_bnsd(input_layout)
    weights, largest, total = _weights(query, key, atten_mask, scale, sparse_mode)
    values = value.float().repeat_interleave(query.shape[1] // value.shape[1], 1)
    spread = [t.expand(*t.shape[:-1], 8).contiguous() for t in (largest, total)]
    unused = torch.zeros(1, dtype=torch.int64)
    return (weights @ values).to(query.dtype), *spread, query.new_empty(0), unused, unused.clone()


@operator("npu_fusion_attention_grad_v3")
def attention_grad(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dy: torch.Tensor,
    head_num: int,
    input_layout: str,
    atten_mask: torch.Tensor | None,
    softmax_max: torch.Tensor,
    softmax_sum: torch.Tensor,
    softmax_in: torch.Tensor,
    attention_in: torch.Tensor,
    scale_value: float,
    next_tockens: int,
    inner_precise: int,
    seed: torch.Tensor,
    offset: torch.Tensor,
    sparse_mode: int,
) -> tuple[torch.Tensor, ...]:
    """Gradients of query, key and value; two unused outputs."""
    _only_bnsd(input_layout)
    groups = query.shape[1] // key.shape[1]
    weights, _, _ = _weights(query, key, atten_mask, scale_value, sparse_mode)
    grad, values = dy.float(), value.float().repeat_interleave(groups, 1)
    to_weights = grad @ values.mT
    to_scores = weights * (to_weights - (to_weights * weights).sum(-1, keepdim=True)) * scale_value
    to_query = to_scores @ key.float().repeat_interleave(groups, 1)
    per_head = to_scores.mT @ query.float(), weights.mT @ grad
    to_key, to_value = (t.unflatten(1, (-1, groups)).sum(2) for t in per_head)
    unused = query.new_empty(0), torch.zeros(())
    return *(t.to(query.dtype) for t in (to_query, to_key, to_value)), *unused
