"""The attention functions of transformers that are known, and what they do beyond the plain one."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any, NamedTuple

from hf_kernel_patch.recognition.source import canonical, fingerprint


class Extras(NamedTuple):
    """What an attention function does beyond softmax(scaling q k + mask) v.

    Attributes:
        softcap: whether it takes an option ``softcap``, by which it bounds the scores.
        sinks: whether its module has ``sinks``, one more score a head.
    """

    softcap: bool = False
    sinks: bool = False


_HEAD = """
def eager_attention_forward(
    module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs
):
"""
_REPEAT = """
    key_states = repeat_kv(key, module.num_key_value_groups)
    value_states = repeat_kv(value, module.num_key_value_groups)
"""
_SCORES = """
    attn_weights = torch.matmul(query, key_states.transpose(2, 3)) * scaling
"""
_MASK = """
    if attention_mask is not None:
        attn_weights = attn_weights + attention_mask
"""
_SLICED = """
    if attention_mask is not None:
        causal_mask = attention_mask[:, :, :, : key_states.shape[-2]]
        attn_weights = attn_weights + causal_mask
"""
_END = """
    attn_weights = nn.functional.softmax(attn_weights, dim=-1, dtype=torch.float32).to(query.dtype)
    attn_weights = nn.functional.dropout(attn_weights, p=dropout, training=module.training)
    attn_output = torch.matmul(attn_weights, value_states)
    attn_output = attn_output.transpose(1, 2).contiguous()
    return attn_output, attn_weights
"""
_SOFTCAP_HEAD = """
def eager_attention_forward(
    module, query, key, value, attention_mask, dropout=0.0, scaling=None, softcap=None, **kwargs
):
    if scaling is None:
        scaling = module.head_dim**-0.5
"""
_SOFTCAP = """
    if softcap is not None:
        attn_weights = attn_weights / softcap
        attn_weights = torch.tanh(attn_weights)
        attn_weights = attn_weights * softcap
"""
_SINKS = """
    sinks = module.sinks.reshape(1, -1, 1, 1).expand(query.shape[0], -1, query.shape[-2], -1)
    combined_logits = torch.cat([attn_weights, sinks], dim=-1)
    combined_logits = combined_logits - combined_logits.max(dim=-1, keepdim=True).values
    probs = F.softmax(combined_logits, dim=-1, dtype=combined_logits.dtype)
    scores = probs[..., :-1]
    attn_weights = nn.functional.dropout(scores, p=dropout, training=module.training)
    attn_output = torch.matmul(attn_weights, value_states)
    attn_output = attn_output.transpose(1, 2).contiguous()
    return attn_output, attn_weights
"""
_TRAINING = "training=module.training)"


@cache
def _known() -> dict[str, Extras]:
    """Canonical source -> what it does."""
    found: dict[str, Extras] = {}
    for mask in (_MASK, _SLICED):
        found[canonical(_HEAD + _REPEAT + _SCORES + mask + _END)] = Extras()
        softcap = _SOFTCAP_HEAD + _REPEAT + _SCORES + _SOFTCAP + mask + _END
        found[canonical(softcap)] = Extras(softcap=True)
        for cast in (_TRAINING, _TRAINING + ".to(value_states.dtype)"):
            sinks = _SINKS.replace(_TRAINING, cast)
            found[canonical(_HEAD + _REPEAT + _SCORES + mask + sinks)] = Extras(sinks=True)
    return found


def extras_of(function: Any) -> Extras | None:
    """What an attention function does beyond the plain one, or None for one that is not known."""
    home = f"{getattr(function, '__module__', '')}."
    if not inspect.isfunction(function) or not home.startswith("transformers."):
        return None
    if function.__name__ == "sdpa_attention_forward":
        # Whose masks are all that it knows of windows.
        return Extras() if home == "transformers.integrations.sdpa_attention." else None
    return _known().get(fingerprint(function) or "")
