"""The rotary function, in the signatures of transformers 4 and 5."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hf_kernel_patch.recognition.form import Adapter, Form, register_form
from hf_kernel_patch.recognition.site import Site

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
#: The whole function, as other forms call it.
FULL = (_V4 + _FULL, _V5 + _FULL)
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


def _form(name: str, *bodies: str, cast: bool = False) -> Form:
    variants = {
        head + body: adapter(cast) for body in bodies for head, adapter in ((_V4, _v4), (_V5, _v5))
    }
    return register_form(Form(name, "rope", variants, {"rotate_half": ROTATE_HALF}))


_form("rope.full", _FULL)
_form("rope.partial", _PARTIAL, _PARTIAL_IN_TWO_STEPS)
_form("rope.cast", _CAST, cast=True)
