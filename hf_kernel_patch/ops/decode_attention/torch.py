"""decode_attention in plain PyTorch: transformers' sdpa path over the slots that are filled."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from hf_kernel_patch.ops.decode_attention.memory import LayerCache


def decode_attention(
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    layer: LayerCache,
    position: torch.Tensor,
    size: int,
    mask: torch.Tensor | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """As :func:`hf_kernel_patch.ops.decode_attention.reference.decode_attention`.

    On the CPU it reads the position; elsewhere that would wait for the device, so it looks at all
    of the ``size`` slots there.
    """
    keys, values = layer.keys, layer.values
    slot = position - layer.address[3]
    if key is not None and value is not None:
        keys.index_copy_(2, slot, key.to(layer.dtype))
        values.index_copy_(2, slot, value.to(layer.dtype))
    if query.device.type == "cpu":
        length = int(slot) + 1
        allowed = None if mask is None else mask[:, :length]
    else:
        length = min(size, layer.capacity)
        allowed = torch.arange(length, device=query.device)[None] <= slot
        if mask is not None:
            allowed = allowed & mask[:, :length]
    keys, values = keys[:, :, :length], values[:, :, :length]
    if allowed is not None:
        allowed = allowed[:, None, None]
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    if softcap is None and sinks is None:
        return _sdpa(query, keys, values, allowed, scaling)
    return _eager(query, keys, values, allowed, scaling, softcap, sinks)


def _sdpa(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    allowed: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    batch, heads, _, dim = query.shape
    packs = heads != keys.shape[1] and (allowed is not None or not dim == values.shape[-1] <= 256)
    if packs:  # a group's queries as tokens of its key head
        query = query.reshape(batch, keys.shape[1], -1, dim)
    out = F.scaled_dot_product_attention(
        query,
        keys,
        values,
        attn_mask=allowed,
        scale=scaling,
        enable_gqa=not packs and heads != keys.shape[1],
    )
    return out.reshape(batch, 1, heads, values.shape[-1])


def _eager(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    allowed: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """As the eager attention of Gemma2 and GPT-OSS, which sdpa cannot compute."""
    batch, heads, _, dim = query.shape
    packed = query.reshape(batch, keys.shape[1], -1, dim)
    scores = packed @ keys.mT * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    if sinks is not None:
        sink = sinks.to(scores.dtype).view(1, keys.shape[1], -1, 1).expand(batch, -1, -1, -1)
        scores = torch.cat((scores, sink), -1)
    weights = scores.softmax(-1, torch.float32).to(query.dtype)[..., : keys.shape[2]]
    if allowed is not None and sinks is None:
        weights = weights.masked_fill(~allowed, 0.0)  # not NaN where nothing is allowed
    return (weights @ values).reshape(batch, 1, heads, values.shape[-1])
