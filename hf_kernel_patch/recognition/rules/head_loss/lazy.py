"""A model's output whose logits are computed when they are first read."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, ItemsView, ValuesView
from functools import cache
from typing import TYPE_CHECKING, Any

from hf_kernel_patch.recognition.modules import compiling
from hf_kernel_patch.recognition.rules.head_loss.stand_in import Pending, deferred_tensor, real
from hf_kernel_patch.recognition.rules.head_loss.walkers import walked_over

if TYPE_CHECKING:
    import torch
    from transformers.utils import ModelOutput


#: What a field of an output holds, which may be anything.
Value = Any
#: What ``__reduce__`` gives.
_Reduced = tuple[Value, ...]


@cache
def measured_output(base: type[ModelOutput]) -> type[ModelOutput]:
    """A subclass of an output class with fields for metrics; it pickles as ``base``."""
    from dataclasses import dataclass

    from hf_kernel_patch.ops.linear_cross_entropy.reference import Metrics

    metrics = Metrics._fields

    def reduce(self: ModelOutput) -> _Reduced:
        plain = base(**{name: getattr(self, name) for name in base.__dataclass_fields__})
        vars(plain).update({name: getattr(self, name) for name in metrics})
        reduced: _Reduced = plain.__reduce__()
        return reduced

    members = {
        "__module__": __name__,
        "__doc__": base.__doc__,
        "__annotations__": dict.fromkeys(metrics, Any),
        **dict.fromkeys(metrics),
        "__reduce__": reduce,
    }
    make_class: Callable[..., type[ModelOutput]] = type(base)
    return dataclass(make_class(f"Measured{base.__name__}", (base,), members))


@cache
def lazy_output(base: type[ModelOutput], traced: bool = False) -> type[ModelOutput]:
    """A subclass of an output class whose ``logits`` may be a stand-in; it pickles as ``base``.

    A read gives the real logits, which then take the stand-in's place. The stand-in itself is seen
    by frameworks that walk over outputs, and by code that does not call the methods here, such as
    ``dict.items(output)``. ``traced`` asks for the class that torch.compile can trace, whose
    ``__dict__`` cannot be a property; ``vars(output)`` shows the stand-in there, too.
    """
    attributes = vars(OrderedDict)["__dict__"]

    def settle(self: ModelOutput) -> torch.Tensor | None:
        """Put the real logits in their place, and return them."""
        held: dict[str, Value] = attributes.__get__(self)
        value = held.get("logits")
        if _waits(value):
            value = held["logits"] = real(value)
            OrderedDict.__setitem__(self, "logits", value)
        return value

    def seen(self: ModelOutput) -> dict[str, Value]:
        """What an output holds; its method that calls this was called by a user or a framework."""
        if not walked_over(3):
            settle(self)
        held: dict[str, Value] = attributes.__get__(self)
        return held

    def read(self: ModelOutput) -> torch.Tensor | None:
        return real(vars(self).get("logits")) if compiling() else seen(self).get("logits")

    def write(self: ModelOutput, value: Value) -> None:
        held = vars(self) if compiling() else attributes.__get__(self)
        held.update(logits=value)

    def namespace(self: ModelOutput) -> dict[str, Value]:
        return seen(self)

    def items(self: ModelOutput) -> ItemsView[str, Value]:
        if not compiling():
            seen(self)
        found: ItemsView[str, Value] = base.items(self)
        return found

    def values(self: ModelOutput) -> ValuesView[Value]:
        if not compiling():
            seen(self)
        found: ValuesView[Value] = base.values(self)
        return found

    def settled(self: ModelOutput, value: Value) -> Value:
        """A value of an output, or the real logits in place of a stand-in."""
        if not _waits(value):
            return value
        return real(value) if compiling() else settle(self)

    def item(self: ModelOutput, key: str | int | slice) -> Value:
        if isinstance(key, str):
            return settled(self, base.__getitem__(self, key))
        names = list(self.keys())[key]
        return self[names] if isinstance(names, str) else tuple(self[name] for name in names)

    def get(self: ModelOutput, key: str, default: Value = None) -> Value:
        return settled(self, base.get(self, key, default))

    def post_init(self: ModelOutput) -> None:
        base.__post_init__(self)  # called by this package, it sees stand-ins

    def reduce(self: ModelOutput) -> _Reduced:
        settle(self)
        plain = base(**{name: getattr(self, name) for name in base.__dataclass_fields__})
        reduced: _Reduced = plain.__reduce__()
        return reduced

    members: dict[str, object] = {
        "__module__": __name__,
        "__doc__": base.__doc__,
        "logits": property(read, write),
        "items": items,
        "values": values,
        "get": get,
        "__getitem__": item,
        "__reduce__": reduce,
    }
    if not traced:  # torch.compile calls the base's, where nobody asks who walks over an output
        members["__dict__"] = property(namespace, attributes.__set__)
        members["__post_init__"] = post_init
    # PyTorch's pytrees register it by its name as it is made, and ``base`` has that name already.
    make_class: Callable[..., type[ModelOutput]] = type(base)
    made = make_class(f"{'Traced' if traced else 'Lazy'}{base.__name__}", (base,), members)
    made.__module__, made.__doc__ = base.__module__, base.__doc__
    made.__name__, made.__qualname__ = base.__name__, base.__qualname__
    return made


def _waits(value: Value) -> bool:
    """Whether a value stands for logits that may not have been computed."""
    return isinstance(value, (Pending, deferred_tensor()))
