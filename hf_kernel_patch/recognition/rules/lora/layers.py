"""What a linear layer with adapters of PEFT is at a call: which weights, and how they are used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from hf_kernel_patch.recognition.modules import hooked, hooked_everywhere
from hf_kernel_patch.recognition.rules.lora.dora import magnitude_of

if TYPE_CHECKING:
    import torch
    from torch import nn


class Adapter(NamedTuple):
    """One active adapter: A (R, I), B (O, R) and its bias, and what is done with its input."""

    a: torch.Tensor
    b: torch.Tensor
    b_bias: torch.Tensor | None
    scaling: float
    dropout: nn.Module
    #: Of DoRA: (O,), what the norms of the weight's rows are to be.
    magnitude: torch.Tensor | None = None


def adapters_of(module: Any, given: tuple[Any, ...]) -> list[Adapter] | str:
    """The active adapters of a layer, or why the original has to run.

    ``given`` is what the layer was called with beside its input.
    """
    if any(given):
        return "the layer is called with more than its input"
    if hooked_everywhere():
        return "a hook on all modules needs the original"
    held = module.lora_A
    names = [name for name in module.active_adapters if name in held]
    if not names:
        return "no adapter of this layer is active"
    found: list[Adapter] = []
    for name in names:
        adapter = _adapter(module, name)
        if isinstance(adapter, str):
            return adapter
        found.append(adapter)
    if len(found) > 1 and any(one.magnitude is not None for one in found):
        return "several adapters are active, and one is of DoRA"
    return found


def _adapter(module: Any, name: str) -> Adapter | str:
    a, b, magnitude = module.lora_A[name], module.lora_B[name], None
    for one in (a, b):
        if not is_plain(one):
            return f"a {type(one).__name__} of the adapter is hooked or of its own kind"
    if a.bias is not None:
        return "A of the adapter has a bias"
    if not getattr(module, "cast_input_dtype_enabled", True):
        return "the input is not to be cast to the adapter's dtype"
    dropout = module.lora_dropout[name]
    if (variant := module.lora_variant.get(name)) is not None:
        magnitude = magnitude_of(module, name, variant)
        if isinstance(magnitude, str):
            return magnitude
    return Adapter(a.weight, b.weight, b.bias, module.scaling[name], dropout, magnitude)


def is_plain(module: nn.Module) -> bool:
    """Whether calling a module does what torch's nn.Linear does, and nothing else."""
    from torch import nn

    forward: Any = type(module).forward
    if forward is not nn.Linear.forward or hooked(module):
        return False
    # Somebody may have set another on nn.Linear itself.
    return getattr(forward, "__globals__", {}).get("__name__") == nn.Linear.__module__
