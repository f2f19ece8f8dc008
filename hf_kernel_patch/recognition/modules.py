"""Which activation function a module of transformers computes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

#: (module, class) -> the ops' name of the function that it computes.
_NAMES = {
    ("torch.nn.modules.activation", "SiLU"): "silu",
    ("transformers.activations", "SiLUActivation"): "silu",
    ("transformers.activations", "GELUTanh"): "gelu_tanh",
    ("transformers.activations", "PytorchGELUTanh"): "gelu_tanh",
    ("transformers.activations", "NewGELUActivation"): "gelu_tanh",
    ("transformers.activations", "GELUActivation"): "gelu",
    ("torch.nn.modules.activation", "GELU"): "gelu",
}


#: Class -> its forward and the name, as far as they were asked for: the lookup costs half of what
#: the names do.
_by_class: dict[type, tuple[Any, str]] = {}


def activation_of(module: nn.Module, approximate: str | None = None) -> tuple[str, str | None]:
    """("silu", "gelu" or "gelu_tanh", None), or ("", the reason why no fused op may compute it).

    ``approximate`` is the option that ``torch.nn.functional.gelu`` is called with, if any.
    """
    kind = type(module)
    if compiling():  # a dictionary that grows would be one of its guards
        name = _name_of(kind)
    else:
        forward = getattr(kind, "forward", None)
        known = _by_class.get(kind)
        if known is None or known[0] is not forward:
            known = _by_class[kind] = forward, _name_of(kind)
        name = known[1]
    if not name:
        if name := _function_of(module, approximate):
            return name, None
        return "", f"the activation {type(module).__name__} has no fused form"
    if touched(module):
        return "", "a hook on the activation needs the original"
    if vars(module).get("inplace"):
        return "", "the activation works in place"
    if name == "gelu" and vars(module).get("approximate", "none") != "none":
        return "gelu_tanh", None
    return name, None


def _name_of(kind: type) -> str:
    """The name of what a class computes, or ""."""
    name = _NAMES.get((kind.__module__, kind.__qualname__), "")
    return name if name and _is_own(kind) else ""


def _is_own(kind: type) -> bool:
    """Whether a class's forward is that of its package: it may be somebody else's by now."""
    theirs = getattr(getattr(kind, "forward", None), "__globals__", {}).get("__name__", "")
    return bool(theirs.partition(".")[0] == kind.__module__.partition(".")[0])


# As torch.compiler.assume_constant_result does: torch.compile is not to trace the look-up.
_is_own._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _function_of(function: object, approximate: str | None) -> str:
    """The name of torch's own function that this is, or ""."""
    name = getattr(function, "__name__", "")
    if name == "silu":
        own = getattr(function, "__module__", "") == "torch.nn.functional"
        return name if own and approximate is None else ""
    if name != "gelu" or getattr(function, "__module__", "") != "torch._C._nn":
        return ""
    return {None: "gelu", "none": "gelu", "tanh": "gelu_tanh"}.get(approximate, "")


def touched(module: nn.Module) -> bool:
    """Whether calling the module does more than its class's forward."""
    return hooked_everywhere() or hooked(module)


def hooked(module: nn.Module) -> bool:
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
