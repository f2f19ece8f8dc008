"""Tiny models of the real classes, and what the tests ask of them."""

from __future__ import annotations

import importlib
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from hf_kernel_patch.models import architectures
from hf_kernel_patch.patching.lookup import exists_here
from hf_kernel_patch.recognition import known

TRANSFORMERS_5 = Version(transformers.__version__) >= Version("5")
#: Those that the installed transformers has.
ARCHITECTURES = tuple(
    name for name, table in architectures().items() if any(map(exists_here, table.sites))
)
#: Every row (architecture, spec) of the tables that the installed transformers has.
ROWS = tuple(
    (name, spec)
    for name, table in architectures().items()
    for spec in table.sites
    if exists_here(spec)
)
VOCABULARY = 128
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {
    "num_experts": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 80,
}
_LINEAR_ATTENTION = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_CHOSEN = {
    **_EXPERTS,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
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
_VISION = {
    "depth": 1,
    "hidden_size": 32,
    "num_heads": 2,
    "intermediate_size": 32,
    "out_hidden_size": 64,
    "deepstack_visual_indexes": [0],
}
_OWN: dict[str, dict[str, Any]] = {
    "deepseek_v3": {**_CHOSEN, **_LATENT},
    "glm4_moe": {**_CHOSEN, "partial_rotary_factor": 0.5},
    "gpt_oss": {**_EXPERTS, "intermediate_size": 48},
    "olmoe": {**_EXPERTS, "intermediate_size": 48},
    "phi3": {"partial_rotary_factor": 0.5},
    "qwen3_5": _LINEAR_ATTENTION,
    "qwen3_5_moe": {**_EXPERTS, **_LINEAR_ATTENTION},
    "qwen3_next": {**_EXPERTS, **_LINEAR_ATTENTION},
    "qwen2_moe": _EXPERTS,
    "qwen3_moe": _EXPERTS,
    "mixtral": _EXPERTS,
}


#: model_type of the text model, where the table's is that of the model around it.
_TEXT = {"qwen3_5": "qwen3_5_text", "qwen3_5_moe": "qwen3_5_moe_text"}
#: Models with a vision tower: what their text model has of its own.
_SEEING: dict[str, dict[str, Any]] = {
    "qwen3_vl_moe": {"rope_scaling": {"mrope_section": [4, 2, 2], "rope_type": "default"}},
}


def ops_of(name: str) -> tuple[str, ...]:
    """The ops that the architecture's table names for the installed transformers."""
    return tuple(dict.fromkeys(known()[t.code].op for own, t in ROWS if own == name))


def layer_ops_of(name: str) -> tuple[str, ...]:
    """As ``ops_of``, of layers alone: without the loss and the decoding of whole tokens."""
    whole = "linear_cross_entropy", "decode_attention"
    return tuple(op for op in ops_of(name) if op not in whole)


def having(op: str) -> list[str]:
    """Architectures with a row for the op in the installed transformers."""
    return [name for name in ARCHITECTURES if op in ops_of(name)]


def modelling(name: str) -> Any:
    """The modelling module of an architecture, imported."""
    return importlib.import_module(architectures()[name].module)


def tiny_config(name: str, **changes: Any) -> Any:
    """A config of two small layers."""
    if name in _SEEING:
        text = {**SIZES, **_EXPERTS, **_SEEING[name], **changes}
        return AutoConfig.for_model(name, text_config=text, vision_config=_VISION)
    own = {**SIZES, **_OWN.get(name, {}), **changes}
    return AutoConfig.for_model(_TEXT.get(name, name), **own)


def tiny_model(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A causal language model with random weights, norms included; the same at every call."""
    torch.manual_seed(0)
    kind = AutoModelForImageTextToText if name in _SEEING else AutoModelForCausalLM
    model = kind.from_config(tiny_config(name, **changes)).to(dtype)
    with torch.no_grad():
        for own, parameter in model.named_parameters():
            if own.endswith("A_log"):
                # Linear attention that remembers; else its gradients are what cancellation leaves.
                parameter.uniform_(-3.0, -1.0)
            elif own.endswith(".gate.weight"):
                parameter.mul_(16)  # a router that a rounding does not change the mind of
            elif parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def tokens(batch: int = 2, length: int = 17, seed: int = 1) -> torch.Tensor:
    """(batch, length) random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (batch, length), generator=generator)


def outputs_and_gradients(model: Any) -> dict[str, torch.Tensor]:
    """Loss, logits and every gradient of one training step on ``tokens()``."""
    model.zero_grad()
    ids = tokens()
    result = model(ids, labels=ids)
    result.loss.backward()
    found = {"loss": result.loss.detach()}
    if result.logits is not None:
        found["logits"] = result.logits.detach()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[name] = parameter.grad.clone()
    return found


def error(found: torch.Tensor, truth: torch.Tensor) -> float:
    """||found - truth|| / ||truth||, in float64."""
    found, truth = found.double(), truth.double()
    return float((found - truth).norm() / truth.norm().clamp_min(1e-30))


def largest_error(found: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> float:
    """The largest ``error`` over the tensors of both; they have to be the same ones."""
    assert found.keys() == truth.keys()
    return max(error(found[name], truth[name]) for name in truth)
