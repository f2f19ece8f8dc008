"""Which activation function a module of transformers computes."""

from __future__ import annotations

from typing import Any

#: (module, class) -> the ops' name of the function that it computes.
_NAMES = {
    ("torch.nn.modules.activation", "SiLU"): "silu",
    ("transformers.activations", "SiLUActivation"): "silu",
    ("transformers.activations", "GELUTanh"): "gelu_tanh",
    ("transformers.activations", "PytorchGELUTanh"): "gelu_tanh",
}


def activation_of(module: Any) -> tuple[str, str | None]:
    """("silu" or "gelu_tanh", None), or ("", the reason why no fused op may compute it)."""
    kind = type(module)
    name = _NAMES.get((kind.__module__, kind.__qualname__), "")
    if not name and _is_silu(module):
        return "silu", None
    if not name:
        return "", f"the activation {type(module).__name__} has no fused form"
    if touched(module):
        return "", "a hook on the activation needs the original"
    return name, None


def _is_silu(function: Any) -> bool:
    return getattr(function, "__module__", "") == "torch.nn.functional" and (
        getattr(function, "__name__", "") == "silu"
    )


def touched(module: Any) -> bool:
    """Whether calling the module does more than its class's forward."""
    return hooked_everywhere() or hooked(module)


def hooked(module: Any) -> bool:
    """Whether this module's own call does more, apart from the hooks that all modules have."""
    own = vars(module).get("forward")
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or (own is not None and getattr(own, "__func__", None) is not type(module).forward)
    )


def hooked_everywhere() -> bool:
    """Whether torch has hooks that every module's call runs."""
    import torch

    return bool(torch.nn.modules.module._has_any_global_hook())
