"""The rotary function, in the signatures of transformers 4 and 5."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from hf_kernel_patch.recognition.known import Adapter, Leaf, register
from hf_kernel_patch.recognition.site import Site, Swallowed
from hf_kernel_patch.recognition.source import innermost, original_of

ROTATE_HALF = """
def rotate_half(x):
    x1 = x[..., : x.shape[-1] // 2]
    x2 = x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)
"""
_V4 = "def apply_rotary_pos_emb(q, k, cos, sin, position_ids=None, unsqueeze_dim=1):"
_V5 = "def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):"
_FULL = """
    cos = cos.unsqueeze(unsqueeze_dim)
    sin = sin.unsqueeze(unsqueeze_dim)
    q_embed = (q * cos) + (rotate_half(q) * sin)
    k_embed = (k * cos) + (rotate_half(k) * sin)
    return q_embed, k_embed
"""
_PARTIAL = """
    cos = cos.unsqueeze(unsqueeze_dim)
    sin = sin.unsqueeze(unsqueeze_dim)
    rotary_dim = cos.shape[-1]
    q_rot, q_pass = q[..., :rotary_dim], q[..., rotary_dim:]
    k_rot, k_pass = k[..., :rotary_dim], k[..., rotary_dim:]
    q_embed = torch.cat([(q_rot * cos) + (rotate_half(q_rot) * sin), q_pass], dim=-1)
    k_embed = torch.cat([(k_rot * cos) + (rotate_half(k_rot) * sin), k_pass], dim=-1)
    return q_embed, k_embed
"""
_PARTIAL_IN_TWO_STEPS = """
    cos = cos.unsqueeze(unsqueeze_dim)
    sin = sin.unsqueeze(unsqueeze_dim)
    rotary_dim = cos.shape[-1]
    q_rot, q_pass = q[..., :rotary_dim], q[..., rotary_dim:]
    k_rot, k_pass = k[..., :rotary_dim], k[..., rotary_dim:]
    q_embed = (q_rot * cos) + (rotate_half(q_rot) * sin)
    k_embed = (k_rot * cos) + (rotate_half(k_rot) * sin)
    q_embed = torch.cat([q_embed, q_pass], dim=-1)
    k_embed = torch.cat([k_embed, k_pass], dim=-1)
    return q_embed, k_embed
"""
# OLMo2 casts back to q's and k's dtype, which matters where cos and sin are float32.
_CAST = """
    q_type, k_type = q.dtype, k.dtype
    cos = cos.unsqueeze(unsqueeze_dim)
    sin = sin.unsqueeze(unsqueeze_dim)
    q_embed = (q * cos) + (rotate_half(q) * sin)
    k_embed = (k * cos) + (rotate_half(k) * sin)
    return q_embed.to(q_type), k_embed.to(k_type)
"""


def _v4(cast: bool) -> Adapter:
    def adapter(site: Site) -> Callable[..., Any]:
        original, rope = site.original, site.op

        def apply_rotary_pos_emb(
            q: Any, k: Any, cos: Any, sin: Any, position_ids: Any = None, unsqueeze_dim: int = 1
        ) -> Any:
            if site.declines(q, k, cos, sin, unsqueeze_dim, cast):
                return original(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
            return rope(q, k, cos, sin, unsqueeze_dim, cast)

        return apply_rotary_pos_emb

    return adapter


def _v5(cast: bool) -> Adapter:
    def adapter(site: Site) -> Callable[..., Any]:
        original, rope = site.original, site.op

        def apply_rotary_pos_emb(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
            if site.declines(q, k, cos, sin, unsqueeze_dim, cast):
                return original(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
            return rope(q, k, cos, sin, unsqueeze_dim, cast)

        return apply_rotary_pos_emb

    return adapter


def _leaf(name: str, *bodies: str, cast: bool = False) -> Leaf:
    variants = {
        head + body: adapter(cast) for body in bodies for head, adapter in ((_V4, _v4), (_V5, _v5))
    }
    leaf = Leaf(name, "rope", variants, {"rotate_half": ROTATE_HALF})
    register(leaf)
    return leaf


PLAIN = (
    _leaf("rope.full", _FULL),
    _leaf("rope.partial", _PARTIAL, _PARTIAL_IN_TWO_STEPS),
)
_leaf("rope.cast", _CAST, cast=True)
#: function -> what it swallows, or why it is no plain rotary function.
_seen: WeakKeyDictionary[Any, tuple[Swallowed, ...] | str] = WeakKeyDictionary()


def why_not_plain(function: Any) -> str | None:
    """Why a function, patched by us or not, is none of the ``PLAIN`` as it is now, or None."""
    function = original_of(function)
    seen = _seen.get(function)
    if seen is None:
        home = sys.modules.get(getattr(innermost(function), "__module__", ""))
        fits = [leaf for leaf in PLAIN if home and leaf.why_not(function, home) is None]
        seen = (
            fits[0].swallowed(innermost(function), home)
            if fits
            else "the rotary function is no leaf rope.full or rope.partial"
        )
        _seen[function] = seen
    if isinstance(seen, str):
        return seen
    for scope, name, value in seen:
        if scope is not None and scope.get(name) is not value:
            return f"{name} of the rotary function was replaced"
    return None


# torch.compile need not trace the look-up.
why_not_plain._dynamo_marked_constant = True  # type: ignore[attr-defined]
