"""What a rule asks about a norm that it fuses with its neighbours: can its op express the norm?"""

from __future__ import annotations

import inspect
import sys
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, NamedTuple

from hf_kernel_patch.recognition.leaves.norms import plain, weightless
from hf_kernel_patch.recognition.leaves.norms.plain import GROUPED, NORMS, Norm
from hf_kernel_patch.recognition.modules import compiling, touched
from hf_kernel_patch.recognition.source import ROOT, canonical, fingerprint, innermost

if TYPE_CHECKING:
    import torch
    from torch import nn


class _Seen(NamedTuple):
    """What was found out about a class, and the methods that it had then."""

    forward: object
    helper: object
    norm: Norm | None
    #: Why there is no ``norm``.
    reason: str


#: The most classes that are remembered.
_CLASSES = 4096
_seen: dict[type, _Seen] = {}


def norm_of(cls: type) -> Norm | None:
    """What a class of norms computes, patched by us or not.

    None where its code is no known one, or one that only the op of the norm alone can express.
    """
    return _look(cls).norm


def _look(cls: type) -> _Seen:
    forward, helper = getattr(cls, "forward", None), getattr(cls, "_norm", None)
    seen = _seen.get(cls)
    if seen is None or seen.forward is not forward or seen.helper is not helper:
        if len(_seen) > _CLASSES:  # a program that makes classes all the time
            _seen.clear()
        seen = _seen[cls] = _Seen(forward, helper, *_known(forward, cls))
    return seen


def _known(forward: object, cls: type) -> tuple[Norm | None, str]:
    """(what it computes, "") or (None, the reason)."""
    function = innermost(forward)
    text = fingerprint(function) if inspect.isfunction(function) else None
    for leaf in (*plain.LEAVES.values(), *weightless.LEAVES.values()):
        for source in leaf.variants:
            if canonical(source) == text and leaf.why_not(forward, cls) is None:
                norm = GROUPED if leaf.name == "rms_norm.qwen4" else NORMS.get(source)
                return norm, f"{cls.__name__} is a norm that no op spans, {leaf.name}"
    return None, f"{cls.__name__} is not a norm of a known leaf"


def modeling_of(forward: FunctionType) -> ModuleType:
    """The module of transformers that a forward is written in."""
    return sys.modules[innermost(forward).__module__]


def own_class(cls: type) -> type:
    """The class that a module had before it was patched alone, which gives it a class of ours."""
    root: type = getattr(cls, ROOT, cls)
    return root if cls.__mro__[1] is root else cls


def norms_in(modeling: ModuleType) -> dict[type, Norm]:
    """The classes of a modelling module whose code is a norm that a rule can span."""
    classes = [value for value in vars(modeling).values() if isinstance(value, type)]
    return {cls: norm for cls in classes if (norm := norm_of(cls)) is not None}


#: (weight, eps, offset, cast_first), as the ops take them.
Arguments = tuple["torch.Tensor | None", float, float, bool]


def norm_arguments(module: nn.Module, known: dict[type, Norm]) -> tuple[Arguments, str | None]:
    """The arguments for a norm that a rule spans, and why the original has to run, or None.

    torch.compile, which cannot read sources, looks the class up among the ``known``.
    """
    cls = type(module)
    if compiling():
        norm, reason = known.get(own_class(cls)), f"{cls.__name__} is not a norm of a known leaf"
    else:
        _, _, norm, reason = _look(cls)
    if norm is None:
        return (None, 0.0, 0.0, True), reason
    eps_name, offset, cast_first, asks = norm
    fallback = "a hook on the norm needs the original" if touched(module) else None
    if asks and (own := _why_other(module, asks)):
        return (None, 0.0, 0.0, True), own
    weight = module._parameters.get("weight")  # faster than the attribute
    if weight is None:
        weight = module.weight
    return (weight, getattr(module, eps_name), offset, cast_first), fallback


def _why_other(module: nn.Module, asks: tuple[str, ...]) -> str | None:
    """Why this module computes another norm than its class's code does by itself, or None."""
    if "_norm" in asks and "_norm" in vars(module):
        return "the module has a _norm of its own"
    if "with_scale" in asks and not module.with_scale:
        return "the norm has no weight"
    if "group_size" in asks and module.group_size is not None:
        return "the norm is one by groups"
    return None
