"""A tensor that is computed when it is first used, and what stands in its place until then."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any
from weakref import WeakSet

from hf_kernel_patch.recognition.modules import compiling
from hf_kernel_patch.recognition.rules.head_loss.walkers import walked_over


class Pending:
    """A tensor that ``make`` makes when it is first asked for."""

    requires_grad = False

    def __init__(self) -> None:
        self._value: Any = None
        #: Those of its copies that are pending too and alive.
        self.copies: Iterable[Pending] = ()
        self._hooks: OrderedDict[int, Callable[[Any], Any]] = OrderedDict()

    def __call__(self) -> Any:
        if self._value is None:
            self._value = self.make()
            if not compiling():
                self._follow()
        return self._value

    def make(self) -> Any:
        raise NotImplementedError

    @property
    def dtype(self) -> Any:
        """The tensor's."""
        raise NotImplementedError

    @property
    def made(self) -> bool:
        """Whether it has been computed."""
        return self._value is not None

    def _follow(self) -> None:
        """What was asked of the tensor before it was there."""
        for copy in list(self.copies):  # before anybody writes into what they are copies of
            copy()
        if self._hooks:
            self._value.register_hook(self._run_hooks)

    def register_hook(self, hook: Callable[[Any], Any]) -> Any:
        """As ``torch.Tensor.register_hook``, for the tensor that is to come."""
        from torch.utils.hooks import RemovableHandle

        if not self.requires_grad:
            raise RuntimeError("cannot register a hook on a tensor that doesn't require gradient")
        handle = RemovableHandle(self._hooks)
        self._hooks[handle.id] = hook
        return handle

    def _run_hooks(self, grad: Any) -> Any:
        for hook in list(self._hooks.values()):
            changed = hook(grad)
            grad = grad if changed is None else changed
        return grad

    # For code that torch.compile traces, which meets this object and no stand-in.
    def float(self) -> Pending:
        import torch

        return Applied(self, "float", torch.float32)

    def to(self, dtype: Any) -> Pending:
        return Applied(self, "to", dtype, dtype)

    def detach(self) -> Pending:
        return Applied(self, "detach", self.dtype)

    def clone(self) -> Pending:
        return Applied(self, "clone", self.dtype)


class Applied(Pending):
    """What a method of another pending tensor gives."""

    def __init__(self, of: Pending, method: str, dtype: Any, *arguments: Any):
        import torch

        super().__init__()
        self.of, self.method, self._dtype, self.arguments = of, method, dtype, arguments
        self._records = torch.is_grad_enabled()
        self.requires_grad = self._records and method != "detach" and of.requires_grad

    @property
    def dtype(self) -> Any:
        return self._dtype

    def make(self) -> Any:
        import torch

        of = self.of()
        with torch.set_grad_enabled(self._records):
            return getattr(of, self.method)(*self.arguments)


@cache
def deferred_tensor() -> Any:
    """The class of a stand-in for a tensor: Deferred(pending, shape, dtype, device).

    Frameworks walk over outputs to look at tensors, to cast, detach or clone them or to hook their
    gradients, and these leave it a stand-in. Any other use of it by PyTorch is the use of the real
    tensor. Only its type is not the real one's.
    """
    import torch

    tensor = torch.Tensor
    attributes = "shape dtype device layout ndim is_cuda is_sparse _base"
    known = {getattr(tensor, name).__get__ for name in attributes.split()}
    known |= {tensor.size, tensor.dim, tensor.numel}
    known |= {tensor.is_floating_point, torch.is_floating_point}
    #: What the stand-in itself does not know, and the pending tensor does.
    told: dict[Any, Callable[..., Any]] = {
        tensor.requires_grad.__get__: lambda pending: pending.requires_grad,
        tensor.is_leaf.__get__: lambda pending: not pending.requires_grad,
        tensor.grad_fn.__get__: _grad_fn,
        tensor.register_hook: lambda pending, hook: pending.register_hook(hook),
    }

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
            if function in told and not args[0].pending.made:
                return told[function](args[0].pending, *args[1:])
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
        if of.made or torch.is_inference_mode_enabled():
            return None
        if len(args) == 1 and function is tensor.detach:
            return of.detach()
        if len(args) == 1 and function in (tensor.float, tensor.clone):
            return _copy(of, of.float() if function is tensor.float else of.clone())
        if len(args) == 2 and function is tensor.to and isinstance(args[1], torch.dtype):
            return _copy(of, of.to(args[1]))
        return None

    return Deferred


def _copy(of: Pending, copy: Pending) -> Pending:
    if not of.copies:
        of.copies = WeakSet()
    of.copies.add(copy)  # type: ignore[attr-defined]
    return copy


def _grad_fn(pending: Pending) -> Any:
    """The real tensor's; those who only walk over outputs make do without."""
    return None if walked_over(3) or not pending.requires_grad else pending().grad_fn


def real(value: Any) -> Any:
    """The tensor that a value stands for; any other value as it is."""
    if isinstance(value, Pending):
        return value()
    return value.pending() if isinstance(value, deferred_tensor()) else value
