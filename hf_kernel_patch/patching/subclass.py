"""Making the subclass that modules of single models take."""

from __future__ import annotations

import copy
import copyreg
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, SupportsIndex, TypeAlias
from weakref import WeakKeyDictionary

from hf_kernel_patch.recognition.source import ROOT

if TYPE_CHECKING:
    from torch import nn

#: Called for a module and its copy.
Adopt: TypeAlias = "Callable[[nn.Module, nn.Module], None]"

_made: WeakKeyDictionary[type, dict[tuple[tuple[str, object], ...], type]] = WeakKeyDictionary()


def root_of(kind: type) -> type:
    """The class that is no subclass of ours."""
    return next(one for one in kind.__mro__ if ROOT not in vars(one))


def subclass(root: type, methods: Mapping[str, object], adopt: Adopt) -> type:
    """The subclass of ``root`` under its own name with these methods, made once.

    A pickle loads as the original class, without this package. ``adopt(module, twin)`` is called
    for a copy, which comes in its original class.
    """
    known = _made.setdefault(root, {})
    key = tuple(sorted(methods.items(), key=lambda item: item[0]))
    if key not in known:
        known[key] = _subclass(root, methods, adopt)
    return known[key]


def _subclass(root: Any, methods: Mapping[str, object], adopt: Adopt) -> type:
    def reduce(self: nn.Module, protocol: SupportsIndex) -> object:
        make, arguments, *rest = root.__reduce_ex__(self, protocol)
        if make is copyreg.__newobj__:  # type: ignore[attr-defined]
            # Pickle insists that the class it gets is the object's own; this way of making it not.
            make, arguments = copyreg._reconstructor, (type(self), object, None)  # type: ignore[attr-defined]
        return make, tuple(root if part is type(self) else part for part in arguments), *rest

    def twin(self: nn.Module, memo: dict[int, object] | None) -> Any:
        other = root.__new__(root)
        state = dict(vars(self))
        if memo is not None:
            memo[id(self)] = other
            state = copy.deepcopy(state, memo)
        other.__setstate__(state)
        adopt(self, other)
        return other

    def new(cls: Any, *args: object, **kwargs: object) -> object:
        # Who builds a module by the class of a patched one wants what that class is named after.
        if cls is kind and (args or kwargs):
            return root(*args, **kwargs)
        return root.__new__(cls)

    members = {
        "__new__": new,
        "__module__": root.__module__,
        "__qualname__": root.__qualname__,
        "__doc__": root.__doc__,
        ROOT: root,
        **methods,
        "__reduce_ex__": reduce,
    }
    copied = not hasattr(root, "__deepcopy__")
    if copied:
        members["__copy__"] = lambda self: twin(self, None)
    kind: Any = type(root)(root.__name__, (root,), members)
    if copied:
        # Not as a method, which deepcopy would find through a wrapper's __getattr__, and copy what
        # is inside of the wrapper in its place.
        copy._deepcopy_dispatch[kind] = twin  # type: ignore[attr-defined]
    for name, method in methods.items():
        setattr(kind, name, method)  # transformers may have wrapped it once more
    return kind
