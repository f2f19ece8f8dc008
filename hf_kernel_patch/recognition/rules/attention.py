"""Attention with normalised queries and keys: norms and rotary embedding in one op."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

from hf_kernel_patch.recognition.form import Form, register_form
from hf_kernel_patch.recognition.leaves import rotary as rope
from hf_kernel_patch.recognition.leaves.norms import Norm, norm_arguments, norms_in
from hf_kernel_patch.recognition.site import Site
from hf_kernel_patch.recognition.source import canonical, fingerprint, innermost

_TEXT = """
def forward(self, {parameters}, **kwargs):
    input_shape = hidden_states.shape[:-1]
    hidden_shape = (*input_shape, -1, self.head_dim)
    query_states = {q}.transpose(1, 2)
    key_states = {k}.transpose(1, 2)
    value_states = self.v_proj(hidden_states).view(hidden_shape).transpose(1, 2)
    cos, sin = position_embeddings
    query_states, key_states = apply_rotary_pos_emb(query_states, key_states, cos, sin)
    if past_key_values is not None:
        {update}
    {interface}
    attn_output, attn_weights = attention_interface(
        self, query_states, key_states, value_states, attention_mask,
        dropout=0.0 if not self.training else self.attention_dropout,
        scaling=self.scaling, {extra}**kwargs,
    )
    attn_output = attn_output.reshape(*input_shape, -1).contiguous()
    attn_output = self.o_proj(attn_output)
    return attn_output, attn_weights
"""
_UPDATE = "key_states, value_states = past_key_values.update(key_states, value_states, {rest})"
_V5 = {
    "update": _UPDATE.format(rest="self.layer_idx"),
    "interface": (
        "attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface("
        "self.config._attn_implementation, eager_attention_forward)"
    ),
}
_V4 = {
    "update": (
        "cache_kwargs = {'sin': sin, 'cos': cos, 'cache_position': cache_position}\n        "
        + _UPDATE.format(rest="self.layer_idx, cache_kwargs")
    ),
    "interface": (
        "attention_interface = eager_attention_forward\n"
        "    if self.config._attn_implementation != 'eager':\n        "
        "attention_interface = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]"
    ),
}
_STRICT = "hidden_states, position_embeddings, attention_mask, past_key_values=None"
#: (parameters, the parts of the version) of transformers 4 and 5; two spellings in 5.
_VERSIONS = {
    "v4": (f"{_STRICT}, cache_position=None", _V4),
    "v5": (_STRICT, _V5),
    "v5 defaults": (
        "hidden_states, position_embeddings=None, attention_mask=None, past_key_values=None",
        _V5,
    ),
}
#: What the interface is given beside scaling -> how it is found.
_EXTRAS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "": lambda attention: {},
    "sliding_window=self.sliding_window, ": lambda attention: {
        "sliding_window": attention.sliding_window
    },
    "sliding_window=getattr(self.config, 'sliding_window', None), ": lambda attention: {
        "sliding_window": getattr(attention.config, "sliding_window", None)
    },
}


class Attention(NamedTuple):
    """What a text does: norms of q and k or none, its version, and the interface's extras."""

    norms: bool
    version: str
    extra: Callable[[Any], dict[str, Any]]


def _texts() -> dict[str, Attention]:
    found = {}
    for norms in (False, True):
        q, k = (
            f"self.{x}_norm(self.{x}_proj(hidden_states).view(hidden_shape))"
            if norms
            else f"self.{x}_proj(hidden_states).view(hidden_shape)"
            for x in "qk"
        )
        for version, (parameters, parts) in _VERSIONS.items():
            for extra, function in _EXTRAS.items():
                text = _TEXT.format(parameters=parameters, q=q, k=k, extra=extra, **parts)
                found[text] = Attention(norms, version, function)
    return found


TEXTS = _texts()


@cache
def _by_code() -> dict[str, Attention]:
    return {canonical(text): attention for text, attention in TEXTS.items()}


def attention_of(forward: Any) -> Attention | None:
    """What an attention's forward does, patched by us or not; None where it is no known text."""
    function: Any = innermost(forward)
    code = fingerprint(function) if hasattr(function, "__code__") else None
    return _by_code().get(code or "")


def states(
    attention: Any,
    spec: Attention,
    hidden_states: Any,
    position_embeddings: tuple[Any, Any],
    rotary: Callable[..., Any],
    site: Site | None,
    known: dict[type, Norm],
) -> tuple[Any, Any, Any]:
    """q, k and v (B, heads, S, D) as attention takes them, by the op of ``site`` if any."""
    cos, sin = position_embeddings
    shape = (*hidden_states.shape[:-1], -1, attention.head_dim)
    q = attention.q_proj(hidden_states).view(shape)
    k = attention.k_proj(hidden_states).view(shape)
    v = attention.v_proj(hidden_states).view(shape).transpose(1, 2)
    if site is not None:
        (q_weight, *q_options), why_not = norm_arguments(attention.q_norm, known)
        (k_weight, *k_options), why_k_not = norm_arguments(attention.k_norm, known)
        why_not = why_not or why_k_not
        if q_options != k_options:
            why_not = why_not or "the norms of q and k differ"
        arguments = (q, k, q_weight, k_weight, q_options[0], cos, sin, 1, *q_options[1:])
        if not site.declines(*arguments, unless=why_not):
            return *site.op(*arguments), v
    if spec.norms:
        q, k = attention.q_norm(q), attention.k_norm(k)
    return *rotary(q.transpose(1, 2), k.transpose(1, 2), cos, sin), v


def modeling_of(forward: Any) -> Any:
    """The module of transformers that a forward is written in."""
    return sys.modules[innermost(forward).__module__]


def attend(
    attention: Any,
    spec: Attention,
    modeling: Any,
    q_k_v: tuple[Any, Any, Any],
    position_embeddings: tuple[Any, Any],
    attention_mask: Any,
    past_key_values: Any,
    kwargs: dict[str, Any],
) -> tuple[Any, Any]:
    """Cache and attention interface: what the texts do between the heads and the last projection.

    Returns the heads' output (B, S, heads x D) and the attention weights or None.
    """
    q, k, v = q_k_v
    batch, length = q.shape[0], q.shape[2]
    name, eager = attention.config._attn_implementation, modeling.eager_attention_forward
    if spec.version == "v4":
        kwargs = dict(kwargs)
        cos, sin = position_embeddings
        rest = {"sin": sin, "cos": cos, "cache_position": kwargs.pop("cache_position", None)}
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, attention.layer_idx, rest)
        interface = eager if name == "eager" else modeling.ALL_ATTENTION_FUNCTIONS[name]
    else:
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, attention.layer_idx)
        interface = modeling.ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)
    out, weights = interface(
        attention,
        q,
        k,
        v,
        attention_mask,
        dropout=0.0 if not attention.training else attention.attention_dropout,
        scaling=attention.scaling,
        **spec.extra(attention),
        **kwargs,
    )
    return out.reshape(batch, length, -1).contiguous(), weights


def _qk_norm(spec: Attention) -> Callable[[Site], Callable[..., Any]]:
    def adapter(site: Site) -> Callable[..., Any]:
        original = site.original
        modeling = modeling_of(original)
        known = norms_in(modeling)

        def forward(
            self: Any,
            hidden_states: Any,
            position_embeddings: Any,
            attention_mask: Any,
            past_key_values: Any = None,
            **kwargs: Any,
        ) -> Any:
            given = hidden_states, position_embeddings, attention_mask, past_key_values
            if not site.active:
                return original(self, *given, **kwargs)
            rotary = modeling.apply_rotary_pos_emb
            q_k_v = states(self, spec, hidden_states, position_embeddings, rotary, site, known)
            out, weights = attend(self, spec, modeling, q_k_v, *given[1:], kwargs)
            return self.o_proj(out), weights

        def forward_v4(
            self: Any,
            hidden_states: Any,
            position_embeddings: Any,
            attention_mask: Any,
            past_key_values: Any = None,
            cache_position: Any = None,
            **kwargs: Any,
        ) -> Any:
            kwargs["cache_position"] = cache_position
            return forward(
                self, hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs
            )

        return forward_v4 if spec.version == "v4" else forward

    return adapter


register_form(
    Form(
        "attention.qk_norm",
        "qk_norm_rope",
        {
            text: _qk_norm(spec)
            for text, spec in TEXTS.items()
            if spec.norms and spec.version != "v5 defaults"
        },
        {"apply_rotary_pos_emb": rope.FULL, "rotate_half": rope.ROTATE_HALF},
    )
)
