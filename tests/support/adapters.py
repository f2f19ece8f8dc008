"""Models with adapters of PEFT, and a step of their training."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.tiny import tiny_model, tokens

peft = pytest.importorskip("peft")

KERNEL = "torch_fused_lora"
CONFIG = {"target_modules": "all-linear", "r": 4, "lora_alpha": 6, "init_lora_weights": False}


def tuned(name: str = "llama", dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A model with random adapters on all its linear layers."""
    return peft.get_peft_model(tiny_model(name, dtype), peft.LoraConfig(**{**CONFIG, **options}))


def step(model: Any, autocast: bool = False) -> dict[str, torch.Tensor]:
    """Loss, logits and gradients of a training step, with the same random numbers every time."""
    torch.manual_seed(5)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        result = model(input_ids=tokens(), labels=tokens())
    if result.loss.requires_grad:  # not with merged adapters
        result.loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": result.loss.detach(), "logits": result.logits.detach(), **grads}
