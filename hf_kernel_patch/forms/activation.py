"""Which activation function a module of transformers computes."""

from __future__ import annotations

from functools import cache
from typing import Any


@cache
def _names() -> dict[type, str]:
    """Activation class -> the ops' name for it, as the installed transformers has them."""
    from torch import nn
    from transformers.activations import ACT2FN

    names: dict[type, str] = {nn.SiLU: "silu"}
    for key, name in (("silu", "silu"), ("swish", "silu"), ("gelu_pytorch_tanh", "gelu_tanh")):
        names[type(ACT2FN[key])] = name
    return names


def activation_of(module: Any) -> tuple[str, str | None]:
    """("silu" or "gelu_tanh", None), or ("", the reason why no fused op may compute it)."""
    name = _names().get(type(module), "")
    if not name:
        return "", f"the activation {type(module).__name__} has no fused form"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
        return "", "a hook on the activation needs the original"
    return name, None
