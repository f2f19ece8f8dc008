"""The models: public configurations as data, with random weights, cut to what a device can hold."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import torch

_FOLDER = Path(__file__).parents[1] / "configs"
#: Layers measured where all of them would not fit beside gradients on one 80 GB device.
LAYERS = {"llama-3.1-8b": 8, "qwen2.5-7b": 8, "qwen3-30b-a3b": 8}
#: On a CPU: layers of the real size, but two of them, few experts and a small vocabulary.
ON_CPU: dict[str, Any] = {"num_hidden_layers": 2, "vocab_size": 4096, "num_experts": 8}
#: For a smoke test.
QUICK: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 128,
}
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2}


def names() -> list[str]:
    """The models that can be measured."""
    return sorted(path.stem for path in _FOLDER.glob("*.json"))


def config(name: str, device: str, quick: bool, layers: int | None = None) -> dict[str, Any]:
    """A model's configuration as it is measured on the device."""
    data: dict[str, Any] = json.loads((_FOLDER / f"{name}.json").read_text())
    cut = QUICK if quick else ON_CPU if device == "cpu" else {}
    data |= {key: value for key, value in cut.items() if key in data}
    if cut:
        data |= _TOKENS
    if name in LAYERS and not cut:
        data["num_hidden_layers"] = LAYERS[name]
    if layers is not None:
        data["num_hidden_layers"] = layers
    return data


def changes(name: str, data: dict[str, Any]) -> dict[str, Any]:
    """What differs from the public configuration, to be stated beside every figure."""
    public = json.loads((_FOLDER / f"{name}.json").read_text())
    return {
        key: value
        for key, value in data.items()
        if public.get(key) != value and not key.endswith("token_id")
    }


def build(data: dict[str, Any], device: str, dtype: torch.dtype, experts: str | None) -> Any:
    """The causal language model, its weights random and the same at every call.

    ``experts`` is an implementation of transformers' experts, None for its default.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    rest = {key: value for key, value in data.items() if key != "model_type"}
    made = AutoConfig.for_model(data["model_type"], **rest, use_cache=False)
    if experts is not None:
        made._experts_implementation = experts
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(made, attn_implementation="sdpa")
    finally:
        torch.set_default_dtype(before)
    _initialise(model)
    return model


def token_ids(job: dict[str, Any], length: int) -> torch.Tensor:
    """(batch, length) random tokens, the same in every variant."""
    generator = torch.Generator().manual_seed(1)
    shape = job["batch"], length
    ids = torch.randint(3, job["config"]["vocab_size"], shape, generator=generator)
    return ids.to(job["device"])


def cache_name(model: Any) -> str:
    """What the forward and its output call the cache: newer transformers have another name."""
    known = inspect.signature(model.forward).parameters
    return "cache" if "cache" in known else "past_key_values"


def bytes_of_token(model: Any, batch: int, context: int) -> int:
    """What a decoding step has to read at ``context`` tokens a sequence: weights and cache.

    Of the experts as many as the batch can choose: at most, since sequences may choose alike.
    """
    config = model.config
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    total = 0.0
    for name, weight in model.named_parameters():
        share = 1.0
        if weight is table and weight is not head:
            share = batch / len(table)
        elif ".experts." in name:
            share = min(1.0, batch * config.num_experts_per_tok / config.num_experts)
        total += share * weight.numel() * weight.element_size()
    heads = config.num_key_value_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cached = 2 * config.num_hidden_layers * batch * context * heads * width
    return int(total) + cached * head.element_size()


@torch.no_grad()
def _initialise(model: Any) -> None:
    """Fill every parameter here: a replaced class may escape the model's own initialisation."""
    torch.manual_seed(0)
    for name, parameter in sorted(model.named_parameters()):
        parameter.normal_(0, 0.02)
        if parameter.dim() == 1 and not name.endswith("bias"):
            parameter.mul_(5).add_(1)
