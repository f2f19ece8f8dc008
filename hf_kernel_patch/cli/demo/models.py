"""The small models: real classes of transformers with a vocabulary of bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SIZES: dict[str, float] = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 128,
    # 256 bytes, then the ids that a config has to name
    "vocab_size": 259,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
    "tie_word_embeddings": True,
    "initializer_range": 0.05,
    "use_cache": False,
}
_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 384}
MODELS: dict[str, dict[str, int]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": _EXPERTS,
}


def save(name: str, seed: int, directory: str) -> int:
    """Build a model with random weights and save it; returns the number of its parameters."""
    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(seed)
    config = AutoConfig.for_model(name, **{**_SIZES, **MODELS[name]})
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(directory)
    return int(model.num_parameters())


def load(directory: str, device: str, dtype: str) -> PreTrainedModel:
    """The saved model, in training mode."""
    import torch
    import transformers
    from packaging.version import Version
    from transformers import AutoModelForCausalLM

    named = "dtype" if Version(transformers.__version__) >= Version("4.56") else "torch_dtype"
    transformers.utils.logging.disable_progress_bar()
    options = {named: getattr(torch, dtype)}
    return AutoModelForCausalLM.from_pretrained(directory, **options).to(device).train()
