"""Finding in the running process what the tables name, and what stands in its place."""

from __future__ import annotations

import sys
from collections.abc import Collection, Container, Iterable, Mapping
from functools import cache
from types import FunctionType, MethodType, ModuleType
from typing import TYPE_CHECKING, Any

from hf_kernel_patch.models import SiteSpec
from hf_kernel_patch.recognition.composing import Located
from hf_kernel_patch.recognition.source import ROOT, innermost, original_of

if TYPE_CHECKING:
    from torch import nn


def exists_here(spec: SiteSpec) -> bool:
    """Whether the installed transformers is one that has the site."""
    return not spec.transformers or _version_is(spec.transformers)


@cache
def _version_is(wanted: str) -> bool:
    from importlib.metadata import PackageNotFoundError, version

    from packaging.specifiers import SpecifierSet

    try:
        installed = version("transformers")
    except PackageNotFoundError:  # no site is there, whichever version it is of
        return True
    return SpecifierSet(wanted).contains(installed, prereleases=True)


def locate(spec: SiteSpec) -> Located | str:
    """(owner, attribute, value) of a site in an imported module, or why it is not there."""
    owner: Any = sys.modules[spec.module]
    *path, name = spec.qualname.split(".")
    for part in path:
        if not hasattr(owner, part):
            return f"{spec.module} has no {part}"
        owner = getattr(owner, part)
    if not hasattr(owner, name):
        return f"{spec.module} has no {spec.qualname}"
    return owner, name, getattr(owner, name)


def globals_holding(wanted: Mapping[int, object]) -> list[Located]:
    """(module, name, value) of every global of an imported module whose id is a key of these."""
    return [
        (module, name, value)
        for module in list(sys.modules.values())
        if isinstance(names := getattr(module, "__dict__", None), dict)
        # Nearly all hold none, which is found without a step of Python for each name.
        if not wanted.keys().isdisjoint(map(id, list(names.values())))
        for name, value in list(names.items())
        if id(value) in wanted
    ]


def inheriting(forwards: Collection[object], classes: Iterable[type]) -> set[type]:
    """The classes, and their subclasses, that have one of the ``forwards``."""
    kinds: set[type] = set()
    todo = list(classes)
    while todo:
        kind = todo.pop()
        if kind not in kinds and getattr(kind, "forward", None) in forwards:
            kinds.add(kind)
            todo += kind.__subclasses__()
    return kinds


def owned_forwards(objects: Iterable[object], kinds: Container[type]) -> list[Located]:
    """(instance, name, value) of every forward that one of the objects owns itself.

    Looks at instances of the kinds. The names are "forward" and "_old_forward", where accelerate's
    hooks keep what they wrap.
    """
    return [
        (instance, name, vars(instance)[name])
        for instance in objects
        if type(instance) in kinds
        for name in ("forward", "_old_forward")
        if name in vars(instance)
    ]


def wrapping_subclasses(owner: type, name: str) -> list[type]:
    """Subclasses whose own function is the owner's in another wrapper of transformers.

    It wraps the forward of every class of layers that is made, such as those of FSDP2.
    """
    inner = innermost(original_of(getattr(owner, name)))
    return [
        kind
        for kind in _subclasses(owner)
        if name in vars(kind) and innermost(original_of(vars(kind)[name])) is inner
    ]


def _subclasses(kind: type) -> list[type]:
    """All subclasses, theirs too; not the classes that one model of ours has taken themselves."""
    known: list[type] = type.__subclasses__(kind)
    children = [child for child in known if ROOT not in vars(child)]
    return children + [found for child in known for found in _subclasses(child)]


def calls_by_name(module: nn.Module, name: str, value: object) -> bool:
    """Whether the module's forward calls a function by that global name."""
    function = innermost(getattr(type(module), "forward", None))
    return (
        isinstance(function, FunctionType)
        and name in function.__code__.co_names
        and original_of(function.__globals__.get(name)) is value
    )


def owner_of(instance: nn.Module, classes: Container[type]) -> type:
    return next(kind for kind in type(instance).__mro__ if kind in classes)


def is_plain_bound(value: object, instance: nn.Module, original: object) -> bool:
    """Whether the value is the class's own forward, only bound to the instance."""
    return (
        isinstance(value, MethodType)
        and value.__self__ is instance
        and original_of(value.__func__) is original
    )


#: Modules whose wrappers call what they wrap: accelerate's forward for mixed precision.
_CALLING_THROUGH = {"accelerate.utils.operations", "torch.amp.autocast_mode"}


def called_through(value: Any) -> Any:
    """The function that a forward calls in the end, where wrappers for mixed precision are it."""
    value = getattr(value, "__func__", value)
    # By its globals, since wrappers take over the name and the module of what they wrap.
    home = getattr(value, "__globals__", {}).get("__name__") or type(value).__module__
    inner = getattr(value, "__wrapped__", None)
    return value if inner is None or home not in _CALLING_THROUGH else called_through(inner)


def describe(value: object) -> str:
    """Where a function comes from, for a message."""
    function = innermost(getattr(value, "__func__", getattr(value, "func", value)))
    module = getattr(function, "__globals__", {}).get("__name__") or type(value).__module__
    return f"{getattr(function, '__qualname__', type(value).__name__)} of {module}"


def is_own_code(owner: object, value: object) -> bool:
    """Whether a function was defined by the module ``owner`` itself, as it is by a reload."""
    function = innermost(value)
    return (
        isinstance(owner, ModuleType)
        and isinstance(function, FunctionType)
        and function.__globals__ is vars(owner)
    )
