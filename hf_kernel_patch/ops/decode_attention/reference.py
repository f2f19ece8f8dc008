"""The definition, in plain PyTorch."""

from __future__ import annotations

import torch

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
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Attention of one new token a sequence over the cache that its key and value are added to.

    With slot = position - start, first K[slot] = key and V[slot] = value. Then, for the query q of
    a head and the slots j <= slot that the mask allows,

        s_j = scaling q.K_j,  with a softcap c: c tanh(s_j / c)
        out = sum_j exp(s_j) V_j / (sum_j exp(s_j) + exp(sink)),  exp(sink) only where given,

    which is zero where the mask allows nothing, as for torch's scaled_dot_product_attention. It has
    no backward.

    Args:
        query: (B, H, 1, Dk). H is a multiple of Hkv, and head h reads key head h // (H // Hkv).
        key, value: (B, Hkv, 1, Dk) and (B, Hkv, 1, Dv); None where another layer wrote them.
        layer: the cache; written to in place. slot < capacity.
        position: (1), int64: absolute position of the new token.
        size: slot < size; the slots from size on are not looked at.
        mask: (1 or B, size), bool: the slots that may be attended.
        scaling: Dk ** -0.5 where None.
        sinks: (H).
        dtype: of the arithmetic.

    Returns:
        (B, 1, H, Dv) in query's dtype.
    """
    slot = int(position) - int(layer.address[3])
    if key is not None and value is not None:
        layer.keys[:, :, slot] = key[:, :, 0].to(layer.dtype)
        layer.values[:, :, slot] = value[:, :, 0].to(layer.dtype)
    batch, heads, _, dim = query.shape
    group = heads // layer.heads
    keys = layer.keys[:, :, : slot + 1].to(dtype).repeat_interleave(group, 1)
    values = layer.values[:, :, : slot + 1].to(dtype).repeat_interleave(group, 1)
    scores = query.to(dtype) @ keys.mT * (dim**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None, : slot + 1], -torch.inf)
    if sinks is not None:
        sink = sinks.to(dtype).view(1, heads, 1, 1).expand(batch, -1, -1, -1)
        scores = torch.cat((scores, sink), -1)
    weights = scores.softmax(-1).nan_to_num(0.0)  # NaN of rows that are all -inf
    return (weights[..., : slot + 1] @ values).transpose(1, 2).contiguous().to(query.dtype)
