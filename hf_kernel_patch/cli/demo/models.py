"""The models: real classes of transformers with a vocabulary of bytes, as large as suits a device.

On a CPU a step takes less than a second. On an accelerator it is large enough to keep it busy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Size:
    """A model's shape and how it is trained."""

    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    experts: int
    expert_mlp: int
    batch: int
    length: int
    learning_rate: float
    #: The standard deviation of the first weights.
    spread: float
    #: Tokens whose head and loss are measured with the vocabulary of a real model.
    loss_tokens: int


HEAD_DIM = 64
SMALL = Size(256, 768, 3, 4, 2, 8, 384, 8, 128, 2e-3, 0.05, 512)
LARGE = Size(1024, 4096, 8, 16, 4, 16, 512, 8, 512, 5e-4, 0.02, 4096)
#: That of Llama 3.
REAL_VOCABULARY = 128_256
#: Name -> whether it has experts.
MODELS = {"llama": False, "qwen2": False, "qwen3": False, "qwen3_moe": True}


def size_on(device: str) -> Size:
    """The size for a device."""
    return SMALL if device == "cpu" else LARGE


def build(name: str, size: Size, seed: int, device: str, dtype: str) -> PreTrainedModel:
    """A model with random weights, the same for each seed, in training mode."""
    config = {
        "hidden_size": size.hidden,
        "intermediate_size": size.mlp,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "max_position_embeddings": size.length,
        # 256 bytes, then the ids that a config has to name
        "vocab_size": 259,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": 258,
        "initializer_range": size.spread,
    }
    return _made(name, size, config, seed, device, dtype)


def build_for_loss(name: str, size: Size, device: str, dtype: str) -> PreTrainedModel:
    """A model that is nearly all head: one narrow layer and a real vocabulary."""
    config = {
        "hidden_size": HEAD_DIM,
        "intermediate_size": HEAD_DIM,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "max_position_embeddings": size.loss_tokens,
        "vocab_size": REAL_VOCABULARY,
    }
    return _made(name, size, config, 0, device, dtype)


def _made(
    name: str, size: Size, config: dict[str, Any], seed: int, device: str, dtype: str
) -> PreTrainedModel:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config |= {"head_dim": HEAD_DIM, "tie_word_embeddings": True, "use_cache": False}
    if MODELS[name]:
        config |= {"num_experts": size.experts, "num_experts_per_tok": 2}
        config |= {"moe_intermediate_size": size.expert_mlp}
    # On the CPU in every case: the weights of a seed are to be the same in both runs.
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **config))
    return model.to(device, getattr(torch, dtype)).train()
