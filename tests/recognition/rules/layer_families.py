"""Families whose layers and attentions are written in other orders than Llama's and Qwen3's.

No table describes them: theirs are made here.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from transformers import AutoConfig

from hf_kernel_patch.models import Architecture
from tests.support.tiny import tiny_model

_SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
_EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_shared_experts": 1,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "n_group": 2,
    "topk_group": 1,
    "num_dense_layers": 1,
    "first_k_dense_replace": 1,
    "mlp_layer_types": ["dense", "sparse"],
}
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "head_dim": 8,
}
#: model_type -> (what its config has of its own, the attention and the layer that are patched, how
#: many of two attentions are, and the modelling module where its name is another).
FAMILIES: dict[str, tuple[dict[str, Any], str, str, int, str]] = {
    # Rotated on some layers alone, after norms that all layers have.
    "afmoe": ({**_SLIDING, **_EXPERTS}, "AfmoeAttention", "AfmoeDecoderLayer", 1, ""),
    "beam": (_SLIDING, "BeamAttention", "", 1, ""),
    "flint": (_SLIDING, "FlintAttention", "FlintDecoderLayer", 1, ""),
    # The same, normalised after the transposes; the layers normalise before the sums.
    "exaone4": (_SLIDING, "Exaone4Attention", "", 1, ""),
    "exaone_moe": ({**_SLIDING, **_EXPERTS}, "ExaoneMoeAttention", "ExaoneMoeDecoderLayer", 1, ""),
    "kolibri1": ({**_SLIDING, **_EXPERTS}, "Kolibri1Attention", "Kolibri1DecoderLayer", 1, ""),
    # Normalised after the transposes.
    "apertus": ({"hidden_act": "silu"}, "ApertusAttention", "ApertusDecoderLayer", 2, ""),
    "gemma3_text": (_SLIDING, "Gemma3Attention", "Gemma3DecoderLayer", 2, "gemma3"),
    "hy_v3": (_EXPERTS, "HYV3Attention", "HYV3DecoderLayer", 2, ""),
    # Normalised if it is asked for.
    "glm4_moe": (
        {**_EXPERTS, "use_qk_norm": True, "partial_rotary_factor": 0.5},
        "Glm4MoeAttention",
        "Glm4MoeDecoderLayer",
        2,
        "",
    ),
    # A rotary function that casts back, with the norm inside of the MLP's call.
    "lfm3": ({"layer_types": ["conv", "full_attention"]}, "Lfm3Attention", "", 1, ""),
    # The norm inside of the MLP's call.
    "lfm2": (
        {"layer_types": ["conv", "full_attention"]},
        "Lfm2Attention",
        "Lfm2DecoderLayer",
        1,
        "",
    ),
    "lfm2_moe": (
        {"layer_types": ["conv", "full_attention"], **_EXPERTS},
        "Lfm2MoeAttention",
        "Lfm2MoeDecoderLayer",
        1,
        "",
    ),
    # A norm that is returned.
    "axk1": ({**_EXPERTS, **_LATENT}, "", "AXK1MoE", 0, ""),
}


def module_of(name: str) -> str:
    own = FAMILIES[name][4] or name
    return f"transformers.models.{own}.modeling_{own}"


def exists(name: str) -> bool:
    try:
        AutoConfig.for_model(name)
        importlib.import_module(module_of(name))
    except (ImportError, ValueError):
        return False
    return True


HERE = [name for name in FAMILIES if exists(name)]


def table_of(name: str) -> Architecture:
    """The rows of a family."""
    _, attention, layer, _, _ = FAMILIES[name]
    rows = {f"{attention}.forward": "qk_norm_rope", f"{layer}.forward": "residual_norm"}
    rows.pop(".forward", None)
    return Architecture(name, rows, module_of(name))


def model_of(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A tiny model of a family."""
    return tiny_model(name, dtype, **{**FAMILIES[name][0], **changes})


def expected(name: str, model: Any, times: int = 1) -> dict[str, int]:
    """op -> the calls that it serves where every layer is called so many times."""
    _, attention, layer, rotated, _ = FAMILIES[name]
    layers = [one for one in model.modules() if type(one).__name__ == layer]
    found = {"qk_norm_rope": rotated * times} if attention else {}
    return {**found, "add_rms_norm": len(layers) * times} if layer else found
