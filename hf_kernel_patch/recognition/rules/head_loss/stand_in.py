"""A tensor that is computed when it is first used, and what stands in its place until then."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from functools import cache
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from hf_kernel_patch.recognition.modules import compiling
from hf_kernel_patch.recognition.rules.head_loss.walkers import walked_over

if TYPE_CHECKING:
    import torch
    from torch.utils.hooks import RemovableHandle

#: What a function of PyTorch is given or gives, which may be anything.
Value = Any
_Hook = Callable[["torch.Tensor"], "torch.Tensor | None"]


class Pending:
    """A tensor that ``make`` makes when it is first asked for."""

    requires_grad = False

    def __init__(self) -> None:
        self._value: torch.Tensor | None = None
        #: Its copies that are pending and alive.
        self.copies: Iterable[Pending] = ()
        self._hooks: OrderedDict[int, _Hook] = OrderedDict()

    def __call__(self) -> torch.Tensor:
        """The tensor."""
        if self._value is None:
            self._value = self.make()
            if not compiling():
                self._follow(self._value)
        return self._value

    def make(self) -> torch.Tensor:
        """Compute the tensor."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """The tensor's dtype."""
        raise NotImplementedError

    @property
    def made(self) -> bool:
        """Whether it has been computed."""
        return self._value is not None

    def _follow(self, tensor: torch.Tensor) -> None:
        """Do what was asked of the tensor before it was computed."""
        for copy in list(self.copies):  # before other code writes into this tensor
            copy()
        if self._hooks:
            tensor.register_hook(self._run_hooks)

    def register_hook(self, hook: _Hook) -> RemovableHandle:
        """As ``torch.Tensor.register_hook``, for the tensor that is to come."""
        from torch.utils.hooks import RemovableHandle

        if not self.requires_grad:
            raise RuntimeError("cannot register a hook on a tensor that doesn't require gradient")
        handle = RemovableHandle(self._hooks)
        self._hooks[handle.id] = hook
        return handle

    def _run_hooks(self, grad: torch.Tensor) -> torch.Tensor:
        for hook in list(self._hooks.values()):
            changed = hook(grad)
            grad = grad if changed is None else changed
        return grad

    # Code that torch.compile traces uses this object itself, without a stand-in.
    def float(self) -> Pending:
        import torch

        return Applied(self, "float", torch.float32)

    def to(self, dtype: torch.dtype) -> Pending:
        return Applied(self, "to", dtype, dtype)

    def detach(self) -> Pending:
        return Applied(self, "detach", self.dtype)

    def clone(self) -> Pending:
        return Applied(self, "clone", self.dtype)


class Applied(Pending):
    """What a method of another pending tensor gives."""

    def __init__(self, of: Pending, method: str, dtype: torch.dtype, *arguments: torch.dtype):
        import torch

        super().__init__()
        self.of, self.method, self._dtype, self.arguments = of, method, dtype, arguments
        self._grad_enabled = torch.is_grad_enabled()
        self.requires_grad = self._grad_enabled and method != "detach" and of.requires_grad

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    def make(self) -> torch.Tensor:
        import torch

        of = self.of()
        with torch.set_grad_enabled(self._grad_enabled):
            return getattr(of, self.method)(*self.arguments)


@cache
def deferred_tensor() -> type[torch.Tensor]:
    """The class of a stand-in for a tensor: Deferred(pending, shape, dtype, device).

    Frameworks walk over outputs to look at tensors, to cast, detach or clone them or to hook their
    gradients. These uses do not compute the tensor: what they give is a stand-in, too. Any other
    use by PyTorch computes the tensor and uses it. Only its type is not that of the tensor.
    """
    import torch

    tensor = torch.Tensor
    attributes = "shape dtype device layout ndim is_cuda is_sparse _base"
    known = {getattr(tensor, name).__get__ for name in attributes.split()}
    known |= {tensor.size, tensor.dim, tensor.numel}
    known |= {tensor.is_floating_point, torch.is_floating_point}
    #: What the stand-in itself does not know: function -> how the pending tensor answers.
    told: dict[Callable[..., Value], Callable[..., Value]] = {
        tensor.requires_grad.__get__: lambda pending: pending.requires_grad,
        tensor.is_leaf.__get__: lambda pending: not pending.requires_grad,
        tensor.grad_fn.__get__: _grad_fn,
        tensor.register_hook: lambda pending, hook: pending.register_hook(hook),
    }

    class Deferred(tensor):  # type: ignore[misc, valid-type]
        pending: Pending

        @staticmethod
        def __new__(
            cls: type[torch.Tensor],
            pending: Pending,
            shape: torch.Size,
            dtype: torch.dtype,
            device: torch.device,
        ) -> torch.Tensor:
            made = tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
            made.pending = pending
            return made

        def __init__(self, *_: object):
            pass

        @classmethod
        def __torch_function__(
            cls,
            function: Callable[..., Value],
            types: Iterable[type],
            args: tuple[Value, ...] = (),
            kwargs: dict[str, Value] | None = None,
        ) -> Value:
            from torch.utils._pytree import tree_map_only

            kwargs = kwargs or {}
            if function in told and not args[0].pending.made:
                return told[function](args[0].pending, *args[1:])
            with torch._C.DisableTorchFunctionSubclass():
                if function in known:
                    return function(*args, **kwargs)
                if (later := _later(function, args, kwargs)) is not None:
                    return Deferred(later, args[0].shape, later.dtype, args[0].device)
            args, kwargs = tree_map_only(
                Deferred, lambda deferred: deferred.pending(), (args, kwargs)
            )
            return function(*args, **kwargs)

        # For code that calls PyTorch's operators without __torch_function__.
        __torch_dispatch__ = __torch_function__

    def _later(
        function: Callable[..., Value], args: tuple[Value, ...], kwargs: dict[str, Value]
    ) -> Pending | None:
        """The result of a function if it can be computed later, or None."""
        if kwargs or not args or not isinstance(args[0], Deferred):
            return None
        of: Pending = args[0].pending
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
    """Note a copy, which is computed before anything can write into what it is a copy of."""
    if not of.copies:
        of.copies = WeakSet()
    of.copies.add(copy)  # type: ignore[attr-defined]
    return copy


def _grad_fn(pending: Pending) -> torch.autograd.graph.Node | None:
    """The tensor's; None for frameworks that walk over outputs, so that they compute nothing."""
    return None if walked_over(3) or not pending.requires_grad else pending().grad_fn


def real(value: Value) -> Value:
    """The tensor that a value stands for; any other value as it is."""
    if isinstance(value, Pending):
        return value()
    return value.pending() if isinstance(value, deferred_tensor()) else value
