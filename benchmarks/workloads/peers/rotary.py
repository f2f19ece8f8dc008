"""rope and qk_norm_rope by others."""

from __future__ import annotations

import importlib
from typing import Any

from benchmarks.workloads.ops import Arguments
from benchmarks.workloads.peers.builder import Built
from benchmarks.workloads.peers.norms import eager_norm, liger_norm

#: The op's ``pairs`` -> the family whose rotary function has them, and its name there.
ROTARY = {
    "halves": ("llama", "apply_rotary_pos_emb"),
    "interleaved": ("glm", "apply_rotary_pos_emb"),
    "interleaved_to_halves": ("deepseek_v3", "apply_rotary_pos_emb_interleave"),
}


def eager_rope(a: Arguments) -> Built:
    family, name = ROTARY[getattr(a, "pairs", "halves")]
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")

    # Looked up at each call, as attention does, so that a patch of it takes effect.
    def rope(*tensors: Any) -> Any:
        return getattr(module, name)(*tensors)

    return rope, (a.q, a.k, a.cos, a.sin)


def liger_rope(a: Arguments) -> Built:
    if hasattr(a, "pairs"):
        raise ValueError("it rotates halves")
    from liger_kernel.transformers.rope import liger_rotary_pos_emb

    return liger_rotary_pos_emb, (a.q, a.k, a.cos, a.sin)


def _norms_and_rope(q_norm: Any, k_norm: Any, rope: Any, a: Arguments) -> Built:
    """As Qwen3's attention: norm over (B, S, heads, D), transpose, rotate."""

    def both(q: Any, k: Any, cos: Any, sin: Any) -> Any:
        return rope(q_norm(q).transpose(1, 2), k_norm(k).transpose(1, 2), cos, sin)

    return both, (a.q, a.k, a.cos, a.sin)


def eager_qk_norm_rope(a: Arguments) -> Built:
    rope, _ = eager_rope(a)
    return _norms_and_rope(eager_norm(a.q_weight, a.eps), eager_norm(a.k_weight, a.eps), rope, a)


def liger_qk_norm_rope(a: Arguments) -> Built:
    rope, _ = liger_rope(a)
    return _norms_and_rope(liger_norm(a.q_weight, a.eps), liger_norm(a.k_weight, a.eps), rope, a)
