"""Being told of models that are built of classes which no import of a modelling module announced.

Such are a user's own subclasses of PreTrainedModel, in files, programs and notebooks, and remote
code, whose file transformers runs without an import.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from hf_kernel_patch.models import is_modelling
from hf_kernel_patch.patching.ledger import Attribute, Entry, ledger

if TYPE_CHECKING:
    from torch import nn

#: Of the class that all models derive from.
BASE = "transformers.modeling_utils"
#: Their classes go around models or into them; they hold no models' code.
_OTHERS = {"torch", "transformers", "peft", "accelerate", "bitsandbytes", "deepspeed", "builtins"}


class ModelWatcher:
    """Tells the modules of each subclass of PreTrainedModel when it is built for the first time."""

    def __init__(self, constructed: Callable[[list[str]], None]):
        self._constructed = constructed
        self._entry: Entry | None = None
        self._seen: WeakSet[type] = WeakSet()

    def install(self) -> None:
        """Begin, or see all classes anew."""
        self._seen = WeakSet()
        base = _base()
        if self._entry is not None or base is None:
            return
        original = base.__init__

        @functools.wraps(original)
        def __init__(model: nn.Module, *args: object, **kwargs: object) -> None:
            self._notice(type(model))
            original(model, *args, **kwargs)

        self._entry = ledger.push(Attribute(base, "__init__"), __init__)

    def remove(self) -> None:
        """End; whoever has wrapped what we put there goes on, and we do nothing in it."""
        entry, self._entry = self._entry, None
        if entry is not None:
            ledger.pop(entry)

    def _notice(self, kind: type) -> None:
        if self._entry is not None and kind not in self._seen:
            self._constructed(modules_of([kind]))
            self._seen.add(kind)


def modules_of_models() -> list[str]:
    """The modules, outside of transformers too, that models could be built of now."""
    base = _base()
    return [] if base is None else modules_of(_subclasses(base))


def modules_of(kinds: Iterable[type]) -> list[str]:
    """The modules of classes, of what they derive from and of the layers that those import."""
    found: list[str] = []
    seen: set[str] = set()
    todo = [kind for one in kinds for kind in one.__mro__]
    while todo:
        name = todo.pop().__module__
        if name in seen:
            continue
        seen.add(name)
        if not _may_hold_models(name) or name not in sys.modules:
            continue
        found.append(name)
        if not is_modelling(name):
            layers = [one for one in list(vars(sys.modules[name]).values()) if _is_layer(one)]
            todo += [kind for one in layers for kind in one.__mro__]
    return found


def _base() -> Any:
    """The class that all models derive from, once it is defined."""
    return getattr(sys.modules.get(BASE), "PreTrainedModel", None)


def _may_hold_models(module: str) -> bool:
    top = module.partition(".")[0]
    return is_modelling(module) or (top not in _OTHERS and top not in sys.stdlib_module_names)


def _is_layer(value: object) -> bool:
    base = getattr(sys.modules.get("torch.nn"), "Module", None)
    return isinstance(value, type) and base is not None and issubclass(value, base)


def _subclasses(kind: type) -> list[type]:
    """All subclasses, theirs too."""
    children: list[type] = type.__subclasses__(kind)
    return [one for child in children for one in (child, *_subclasses(child))]
