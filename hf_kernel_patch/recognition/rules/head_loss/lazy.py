"""A model's output whose logits are computed when they are first read."""

from __future__ import annotations

from collections import OrderedDict
from functools import cache
from typing import Any

from hf_kernel_patch.recognition.modules import compiling
from hf_kernel_patch.recognition.rules.head_loss.stand_in import Pending, deferred_tensor, real
from hf_kernel_patch.recognition.rules.head_loss.walkers import walked_over


@cache
def measured_output(kind: type) -> Any:
    """A subclass of an output class with fields for metrics; it pickles as ``kind``."""
    from dataclasses import dataclass

    from hf_kernel_patch.ops.linear_cross_entropy.reference import Metrics

    base: Any = kind
    metrics = Metrics._fields

    def reduce(self: Any) -> Any:
        plain = base(**{name: getattr(self, name) for name in base.__dataclass_fields__})
        vars(plain).update({name: getattr(self, name) for name in metrics})
        return plain.__reduce__()

    members = {
        "__module__": __name__,
        "__doc__": base.__doc__,
        "__annotations__": dict.fromkeys(metrics, Any),
        **dict.fromkeys(metrics),
        "__reduce__": reduce,
    }
    return dataclass(type(base)(f"Measured{base.__name__}", (base,), members))


@cache
def lazy_output(kind: type, traced: bool = False) -> Any:
    """A subclass of an output class whose ``logits`` may be a stand-in; it pickles as ``kind``.

    However they are read they are the real ones, which then take the stand-in's place. The stand-in
    itself is seen by frameworks that walk over outputs, and by who reaches past the methods here,
    as by ``dict.items(output)``. Of the class that torch.compile may trace, for which ``__dict__``
    cannot be a property, ``vars`` shows it too.
    """
    base: Any = kind
    attributes: Any = vars(OrderedDict)["__dict__"]

    def settle(self: Any) -> Any:
        """Put the real logits in their place, and return them."""
        held = attributes.__get__(self)
        value = held.get("logits")
        if _waits(value):
            value = held["logits"] = real(value)
            OrderedDict.__setitem__(self, "logits", value)
        return value

    def seen(self: Any) -> Any:
        """What an output holds, for who asks two calls up."""
        if not walked_over(3):
            settle(self)
        return attributes.__get__(self)

    def read(self: Any) -> Any:
        return real(vars(self).get("logits")) if compiling() else seen(self).get("logits")

    def write(self: Any, value: Any) -> None:
        held = vars(self) if compiling() else attributes.__get__(self)
        held.update(logits=value)

    def named(self: Any) -> Any:
        return seen(self)

    def items(self: Any) -> Any:
        if not compiling():
            seen(self)
        return base.items(self)

    def values(self: Any) -> Any:
        if not compiling():
            seen(self)
        return base.values(self)

    def settled(self: Any, value: Any) -> Any:
        if not _waits(value):
            return value
        return real(value) if compiling() else settle(self)

    def item(self: Any, key: Any) -> Any:
        if isinstance(key, str):
            return settled(self, base.__getitem__(self, key))
        names = list(self.keys())[key]
        return self[names] if isinstance(names, str) else tuple(self[name] for name in names)

    def get(self: Any, key: Any, default: Any = None) -> Any:
        return settled(self, base.get(self, key, default))

    def post_init(self: Any) -> None:
        base.__post_init__(self)  # which finds stand-ins, as it is called from here

    def reduce(self: Any) -> Any:
        settle(self)
        plain = base(**{name: getattr(self, name) for name in base.__dataclass_fields__})
        return plain.__reduce__()

    members = {
        "__module__": __name__,
        "__doc__": base.__doc__,
        "logits": property(read, write),
        "__post_init__": post_init,
        "items": items,
        "values": values,
        "get": get,
        "__getitem__": item,
        "__reduce__": reduce,
    }
    if not traced:
        members["__dict__"] = property(named, attributes.__set__)
    # A name of its own while PyTorch's pytrees get to know it, as they know ``kind`` by its name.
    made = type(base)(f"{'Traced' if traced else 'Lazy'}{base.__name__}", (base,), members)
    made.__module__, made.__doc__ = base.__module__, base.__doc__
    made.__name__, made.__qualname__ = base.__name__, base.__qualname__
    return made


def _waits(value: Any) -> bool:
    """Whether a value stands for logits that may not have been computed."""
    return isinstance(value, (Pending, deferred_tensor()))
