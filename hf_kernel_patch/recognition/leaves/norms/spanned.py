"""What rules ask that span a norm and its neighbours: is it one that their ops can express?"""

from __future__ import annotations

import inspect
import sys
from typing import Any

from hf_kernel_patch.recognition.leaves.norms import plain, weightless
from hf_kernel_patch.recognition.leaves.norms.plain import GROUPED, NORMS, Norm
from hf_kernel_patch.recognition.modules import compiling, touched
from hf_kernel_patch.recognition.source import ROOT, canonical, fingerprint, innermost

_CLASSES = 4096
#: class -> its forward and _norm when it was looked at, what it computes, and else why not.
_seen: dict[type, tuple[Any, Any, Norm | None, str]] = {}


def norm_of(kind: type) -> Norm | None:
    """What a class of norms computes, patched by us or not.

    None where its code is no known one, or one that only the op of the norm alone can express.
    """
    return _look(kind)[2]


def _look(kind: type) -> tuple[Any, Any, Norm | None, str]:
    forward, helper = getattr(kind, "forward", None), getattr(kind, "_norm", None)
    seen = _seen.get(kind)
    if seen is None or seen[0] is not forward or seen[1] is not helper:
        if len(_seen) > _CLASSES:  # somebody makes classes without end
            _seen.clear()
        seen = _seen[kind] = forward, helper, *_known(forward, kind)
    return seen


def _known(forward: Any, kind: type) -> tuple[Norm | None, str]:
    """(what it computes, "") or (None, the reason)."""
    function = innermost(forward)
    text = fingerprint(function) if inspect.isfunction(function) else None
    for leaf in (*plain.LEAVES.values(), *weightless.LEAVES.values()):
        for source in leaf.variants:
            if canonical(source) == text and leaf.why_not(forward, kind) is None:
                norm = GROUPED if leaf.name == "rms_norm.qwen4" else NORMS.get(source)
                return norm, f"{kind.__name__} is a norm that no op spans, {leaf.name}"
    return None, f"{kind.__name__} is not a norm of a known leaf"


def modeling_of(forward: Any) -> Any:
    """The module of transformers that a forward is written in."""
    return sys.modules[innermost(forward).__module__]


def own_class(kind: type) -> type:
    """The class that a module had before one model's patch, where it has a class of ours."""
    root: type = getattr(kind, ROOT, kind)
    return root if kind.__mro__[1] is root else kind


def norms_in(modeling: Any) -> dict[type, Norm]:
    """The classes of a modelling module whose code is a norm that a rule can span."""
    kinds = [kind for kind in vars(modeling).values() if isinstance(kind, type)]
    return {kind: norm for kind in kinds if (norm := norm_of(kind)) is not None}


def norm_arguments(
    module: Any, known: dict[type, Norm]
) -> tuple[tuple[Any, float, float, bool], str | None]:
    """(weight, eps, offset, cast_first) of a norm that a rule spans, or why it cannot be.

    torch.compile, which cannot read sources, looks the class up among the ``known``.
    """
    kind = type(module)
    if compiling():
        norm, reason = known.get(own_class(kind)), f"{kind.__name__} is not a norm of a known leaf"
    else:
        _, _, norm, reason = _look(kind)
    if norm is None:
        return (None, 0.0, 0.0, True), reason
    eps_name, offset, cast_first, asks = norm
    why_not = "a hook on the norm needs the original" if touched(module) else None
    if asks and (own := _why_not_here(module, asks)):
        return (None, 0.0, 0.0, True), own
    weight = module._parameters.get("weight")  # which costs less than the attribute
    if weight is None:
        weight = module.weight
    return (weight, getattr(module, eps_name), offset, cast_first), why_not


def _why_not_here(module: Any, asks: tuple[str, ...]) -> str | None:
    """Why this module's norm is another than its class's code says by itself, or None."""
    if "_norm" in asks and "_norm" in vars(module):
        return "the module has a _norm of its own"
    if "with_scale" in asks and not module.with_scale:
        return "the norm has no weight"
    if "group_size" in asks and module.group_size is not None:
        return "the norm is one by groups"
    return None
