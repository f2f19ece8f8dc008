"""A model's output whose logits are computed when they are first read."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any


class Pending:
    """A tensor that ``make`` makes when it is asked for, again where it now has to record."""

    def __init__(self) -> None:
        self._value: Any = None
        self._recorded = False

    def __call__(self) -> Any:
        import torch

        if self._value is None or (torch.is_grad_enabled() and not self._recorded):
            self._recorded = torch.is_grad_enabled()
            self._value = self.make()
        return self._value

    def make(self) -> Any:
        raise NotImplementedError


class _Applied(Pending):
    """A function of another pending tensor."""

    def __init__(self, function: Callable[..., Any], of: Any, *rest: Any):
        super().__init__()
        self.function, self.of, self.rest = function, of, rest

    def make(self) -> Any:
        return self.function(self.of.pending(), *self.rest)


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
                if (dtype := _dtype_later(function, args, kwargs)) is not None:
                    of = args[0]
                    return Deferred(_Applied(function, *args), of.shape, dtype, of.device)
            args, kwargs = tree_map_only(Deferred, lambda one: one.pending(), (args, kwargs))
            return function(*args, **kwargs)

        # For code that reaches PyTorch's operators past the function above.
        __torch_dispatch__ = __torch_function__

    def _dtype_later(function: Any, args: Any, kwargs: Any) -> Any:
        """The dtype after a function that can wait until the result is used, else None."""
        if kwargs or not args or not isinstance(args[0], Deferred):
            return None
        if len(args) == 1 and function in (tensor.float, tensor.detach):
            return torch.float32 if function is tensor.float else args[0].dtype
        if len(args) == 2 and function is tensor.to and isinstance(args[1], torch.dtype):
            return args[1]
        return None

    return Deferred


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
