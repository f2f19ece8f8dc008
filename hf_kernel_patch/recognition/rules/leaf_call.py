"""The calls of a leaf that is a function of its own, in the scope of one model.

For all models the function itself is replaced. For one model the forward that calls it is
rewritten: at each call it asks which function to call for its module.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING

from hf_kernel_patch.recognition import site as sites
from hf_kernel_patch.recognition.edits import replace
from hf_kernel_patch.recognition.function import Function
from hf_kernel_patch.recognition.known import Found, Leaf, Rule, build
from hf_kernel_patch.recognition.measured import MeasuredSite
from hf_kernel_patch.recognition.site import Counters, Site
from hf_kernel_patch.recognition.source import innermost, original_of

if TYPE_CHECKING:
    from torch import nn

#: A function that is a leaf, or what takes its place.
Callee = Callable[..., object]
#: (module, function that its code names) -> the function to call.
_Chooser = Callable[["nn.Module", Callee], Callee]


def leaf_call(leaf: Leaf, holder: ModuleType, name: str, known: Callee) -> Rule:
    """The rule by which ``name`` becomes ``helper(self, name)``.

    ``holder`` is the module that has the leaf under that name, ``known`` the leaf itself.
    """

    def find(function: Function, helper: str) -> Found:
        found = Found()
        if function.unfit is not None:
            found.miss(*function.unfit)
            return found
        for node in function.loads(name):
            if function.stores(name):
                found.miss(node, f"{name} is a local name")
                return Found(near=found.near)
            found.edits += replace(function, node, f"{helper}(self, ", node, ")")
        return found

    def serve(site: Site) -> _Chooser:
        return _chooser(site, leaf, holder, known)

    return Rule(leaf.name, leaf.op, find, serve, leaf.op)


def _chooser(site: Site, leaf: Leaf, holder: ModuleType, known: Callee) -> _Chooser:
    """(module, function) -> the function, or what takes its place for this module."""
    import torch

    adapter = leaf.adapter_for(known, holder)
    if isinstance(adapter, str):  # composing.why_not refuses it before
        raise TypeError(adapter)
    swallowed = leaf.swallowed(innermost(known), holder)
    compiling = torch.compiler.is_compiling

    def replacement(counters: Counters) -> Callee:
        own = type(site)(site.kernel, known, site.explicit, site.options)
        if isinstance(own, MeasuredSite) and isinstance(site, MeasuredSite):
            own.measures = site.measures
        own.active, own.counters, own.swallowed = True, counters, swallowed
        made = build(adapter, own)
        made.__hf_kernel_patch__ = _Made(known, made)  # type: ignore[attr-defined]
        return made

    # One replacement serves all modules, unless calls are counted: then each module has one of its
    # own, with the counters of its model.
    common = replacement([])
    counted: dict[int, tuple[list[int], Callee]] = {}

    def choose(module: nn.Module, function: Callee) -> Callee:
        if not site.in_force(module):
            return function
        if compiling():  # a function that is patched for all models serves such calls itself
            return common if function is known else function
        if original_of(function) is not known:
            return function
        if not sites.counting:
            return common
        counters = [*site.counters, *(site.modules or {}).get(id(module), ())]
        held = counted.get(id(module))
        if held is None or held[0] != list(map(id, counters)):
            held = counted[id(module)] = list(map(id, counters)), replacement(counters)
        return held[1]

    def choose_measured(module: nn.Module, function: Callee) -> Callee:
        site.calls(module)  # type: ignore[attr-defined]
        return choose(module, function)

    site.on_release = counted.clear
    return choose_measured if isinstance(site, MeasuredSite) else choose


class _Made:
    """A replacement and what it replaces, as ``made_by_us`` finds it at the replacement."""

    def __init__(self, original: Callee, function: Callee):
        self.original, self.function = original, function
