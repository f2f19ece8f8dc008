"""A model's output whose logits are computed when they are first read."""

from __future__ import annotations

from functools import cache
from typing import Any


class Pending:
    """A tensor of a dtype that ``make`` makes when it is first asked for."""

    dtype: Any

    def __init__(self) -> None:
        self._value: Any = None

    def __call__(self) -> Any:
        if self._value is None:
            self._value = self.make()
        return self._value

    def make(self) -> Any:
        raise NotImplementedError

    # For code that torch.compile traces, which meets this object and no stand-in.
    def float(self) -> Pending:
        import torch

        return _Applied(self, "float", torch.float32)

    def to(self, dtype: Any) -> Pending:
        return _Applied(self, "to", dtype, dtype)

    def detach(self) -> Pending:
        return _Applied(self, "detach", self.dtype)


class _Applied(Pending):
    """What a method of another pending tensor gives."""

    def __init__(self, of: Pending, method: str, dtype: Any, *arguments: Any):
        super().__init__()
        self.of, self.method, self.dtype, self.arguments = of, method, dtype, arguments

    def make(self) -> Any:
        return getattr(self.of(), self.method)(*self.arguments)


@cache
def deferred_tensor() -> Any:
    """The class of a stand-in for a tensor: Deferred(pending, shape, dtype, device).

    Frameworks walk over outputs to look at tensors, to cast or to detach them, and these leave it
    a stand-in. Any other use of it by PyTorch is the use of the real tensor.
    """
    import torch

    tensor = torch.Tensor
    attributes = "shape dtype device layout ndim requires_grad grad_fn is_leaf is_cuda is_sparse"
    known = {getattr(tensor, name).__get__ for name in attributes.split()}
    known |= {tensor.size, tensor.dim, tensor.numel}
    known |= {tensor.is_floating_point, torch.is_floating_point}

    class Deferred(tensor):  # type: ignore[misc, valid-type]
        pending: Pending

        @staticmethod
        def __new__(cls: Any, pending: Any, shape: Any, dtype: Any, device: Any) -> Any:
            made = tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
            made.pending = pending
            return made

        def __init__(self, *_: Any):
            pass

        @classmethod
        def __torch_function__(
            cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            from torch.utils._pytree import tree_map_only

            kwargs = kwargs or {}
            with torch._C.DisableTorchFunctionSubclass():
                if function in known:
                    return function(*args, **kwargs)
                if (later := _later(function, args, kwargs)) is not None:
                    return Deferred(later, args[0].shape, later.dtype, args[0].device)
            args, kwargs = tree_map_only(Deferred, lambda one: one.pending(), (args, kwargs))
            return function(*args, **kwargs)

        # For code that reaches PyTorch's operators past the function above.
        __torch_dispatch__ = __torch_function__

    def _later(function: Any, args: Any, kwargs: Any) -> Pending | None:
        """The result of a function that can wait until it is used."""
        if kwargs or not args or not isinstance(args[0], Deferred):
            return None
        of = args[0].pending
        if len(args) == 1 and function in (tensor.float, tensor.detach):
            return of.float() if function is tensor.float else of.detach()
        if len(args) == 2 and function is tensor.to and isinstance(args[1], torch.dtype):
            return of.to(args[1])
        return None

    return Deferred


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
def lazy_output(kind: type) -> Any:
    """A subclass of an output class whose ``logits`` may be a stand-in; it pickles as ``kind``.

    By attribute, key, index, slice and as a tuple they are the real ones.
    """
    base: Any = kind

    def real(value: Any) -> Any:
        if isinstance(value, Pending):
            return value()
        return value.pending() if isinstance(value, deferred_tensor()) else value

    def read(self: Any) -> Any:
        held = vars(self)
        return held.get("logits") if held.get("_being_made") else real(held.get("logits"))

    def post_init(self: Any) -> None:
        vars(self).update(_being_made=True)  # transformers 4 reads every field there
        base.__post_init__(self)
        vars(self).update(_being_made=False)

    def item(self: Any, key: Any) -> Any:
        if isinstance(key, str):
            return real(base.__getitem__(self, key))
        names = list(self.keys())[key]
        return self[names] if isinstance(names, str) else tuple(self[name] for name in names)

    def reduce(self: Any) -> Any:
        plain = base(**{name: getattr(self, name) for name in base.__dataclass_fields__})
        return plain.__reduce__()

    members = {
        "__module__": __name__,
        "__doc__": base.__doc__,
        "logits": property(read, lambda self, value: vars(self).update(logits=value)),
        "__post_init__": post_init,
        "get": lambda self, key, default=None: real(base.get(self, key, default)),
        "__getitem__": item,
        "__reduce__": reduce,
    }
    # A name of its own while PyTorch's pytrees get to know it, as they know ``kind`` by its name.
    made = type(base)(f"Lazy{base.__name__}", (base,), members)
    made.__module__, made.__doc__ = base.__module__, base.__doc__
    made.__name__, made.__qualname__ = base.__name__, base.__qualname__
    return made
