"""DoRA: adapters that also set the norm of each row of the weight (arXiv:2402.09353)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hf_kernel_patch.recognition.modules import hooked
from hf_kernel_patch.recognition.rules.lora.dora_texts import texts
from hf_kernel_patch.recognition.source import fingerprint

if TYPE_CHECKING:
    import torch

#: How many elements of the weight are in float32 at once.
_CHUNK = 1 << 22


def magnitude_of(module: Any, name: str, variant: Any) -> torch.Tensor | str:
    """What the norms of the weight's rows are to be, or why no DoRA as it is known is there."""
    kind: Any = type(variant) if not isinstance(variant, type) else variant
    if (kind.__module__, kind.__name__) != ("peft.tuners.lora.variants", "DoraLinearVariant"):
        return f"the adapter is a {kind.__name__.removesuffix('Variant')}"
    layer = module.lora_magnitude_vector[name]
    if not _is_known(kind.forward, type(layer).forward, type(layer).get_weight_norm):
        return "the code of DoRA is not the known one"
    if hooked(layer) or getattr(layer, "fan_in_fan_out", False):
        return "the layer of DoRA is hooked, or its weight is transposed"
    weight: torch.Tensor = layer.weight
    return weight


def row_norms(
    weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float
) -> torch.Tensor:
    """||weight + scaling * B A|| of each row, (O,) in float32, without that sum.

    Its square is ||w||^2 + 2 s w A^T b + s^2 b A A^T b^T, for rows w of the weight and b of B. It
    has no gradient (section 4.3 of the paper).
    """
    import torch

    with torch.no_grad():
        exact = torch.promote_types(weight.dtype, torch.float32)
        a, b = a.to(exact), b.to(exact)
        found = (b @ (a @ a.t())).mul_(b).sum(1).mul_(scaling * scaling)
        rows = max(1, _CHUNK // weight.shape[1])
        for part, inner, out in zip(weight.split(rows), b.split(rows), found.split(rows)):
            part = part.to(exact)
            out += part.square().sum(1)
            out += (part @ a.t()).mul_(inner).sum(1).mul_(2 * scaling)
        return found.clamp_min_(0).sqrt_()


def _is_known(*functions: Any) -> bool:
    """Whether this is the code that PEFT has had since 0.17."""
    return all(fingerprint(getattr(one, "__wrapped__", one)) in texts() for one in functions)
