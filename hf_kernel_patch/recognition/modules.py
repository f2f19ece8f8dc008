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


#: As far as they were asked for: the lookup costs half of what the names do.
_by_class: dict[type, str] = {}


def activation_of(module: Any) -> tuple[str, str | None]:
    """("silu" or "gelu_tanh", None), or ("", the reason why no fused op may compute it)."""
    kind = type(module)
    # A dictionary that grows would be one of torch.compile's guards.
    name = None if compiling() else _by_class.get(kind)
    if name is None:
        name = _NAMES.get((kind.__module__, kind.__qualname__), "")
        if not compiling():
            _by_class[kind] = name
    if not name:
        if _is_silu(module):
            return "silu", None
        return "", f"the activation {type(module).__name__} has no fused form"
    if touched(module):
        return "", "a hook on the activation needs the original"
    if vars(module).get("inplace"):
        return "", "the activation works in place"
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
    global _any_hook
    if _any_hook is None:
        from torch.nn.modules.module import _has_any_global_hook as _any_hook
    return bool(_any_hook())


#: torch's own answer, kept, since an import and its attributes cost more than the question.
_any_hook: Any = None


def compiling() -> bool:
    """Whether torch.compile is tracing."""
    global _is_compiling
    if _is_compiling is None:
        from torch.compiler import is_compiling as _is_compiling
    return bool(_is_compiling())


_is_compiling: Any = None
