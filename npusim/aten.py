"""PyTorch's own operators on npu: the CPU's kernels over the device's memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .counter import count
from .memory import alias, convert, is_on_device, to_device
from .operators.backward import matmul_gradients

#: Operators that the wheel differentiates whole, through kernels that cannot be replaced: taken
#: apart instead, as PyTorch does on other devices.
TAKEN_APART = ("argsort", "argsort.stable", "one_hot", "where")
#: Operators that handle memory and metadata: the wheel's own, they launch no kernel.
OF_THE_WHEEL = frozenset(
    {
        "_pin_memory",
        "_to_copy",
        "as_strided_",
        "empty.memory_format",
        "empty_like",
        "empty_strided",
        "is_pinned",
        "new_empty_strided",
        "record_stream",
        "resize_",
        "resize_as_",
        "set_",
        "set_.source_Storage",
        "set_.source_Storage_storage_offset",
        "set_.source_Tensor",
    }
)


def install(library: torch.library.Library) -> None:
    """Replaces the wheel's kernels for aten operators; those that only make views stay.

    ``library`` implements the namespace aten.
    """
    for registered in torch._C._dispatch_get_registrations_for_dispatch_key("PrivateUse1"):
        namespace, _, name = registered.partition("::")
        operator = _find(name) if namespace == "aten" and name not in OF_THE_WHEEL else None
        if operator is not None and not _makes_view(operator):
            library.impl(name, _on_host(operator, name), "PrivateUse1", allow_override=True)
    for name in TAKEN_APART:
        library.impl(name, _in_parts(_find(name)), "AutogradPrivateUse1", allow_override=True)
    # The CPU lacks these: it differentiates matmul as mm and bmm, and bins floats only.
    library.impl("matmul_backward", _matmul_backward, "PrivateUse1", allow_override=True)
    library.impl("histc", _histc, "PrivateUse1", allow_override=True)


def _find(name: str) -> Any:
    """The operator object of "add.Tensor", or None where torch has no schema of that name."""
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet, None), overload or "default", None)


def _makes_view(operator: Any) -> bool:
    returned = operator._schema.returns
    return any(r.alias_info is not None and not r.alias_info.is_write for r in returned)


def _on_host(operator: Any, name: str) -> Callable[..., Any]:
    """A kernel for npu tensors that runs the same operator on the CPU, over the same memory."""

    def kernel(*args: Any, **kwargs: Any) -> Any:
        count(name)
        given: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # keeps what the ids are of

        def to_host(value: Any) -> Any:
            if is_on_device(value):
                seen = alias(value)
                given[id(seen)] = (seen, value)
                return seen
            if isinstance(value, torch.device) and value.type == "npu":
                return torch.device("cpu")
            if isinstance(value, torch.Generator) and value.device.type == "npu":
                raise NotImplementedError(f"npusim: {name} with a generator of the device")
            return value

        def back(value: Any) -> Any:
            if id(value) in given:  # an argument that was written to and is returned
                seen, own = given[id(value)]
                return _resized(own, seen)
            return to_device(value)

        host_args, host_kwargs = convert(args, to_host), convert(kwargs, to_host)
        if host_kwargs.get("pin_memory"):
            host_kwargs["pin_memory"] = False
        return convert(operator(*host_args, **host_kwargs), back)

    return kernel


def _in_parts(operator: Any) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        return operator._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, *args, **kwargs)

    return kernel


def _resized(own: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """``own``, after an ``out=`` operator gave its alias another shape."""
    if own.shape != seen.shape:
        own.resize_(seen.shape)
        alias(own).copy_(seen)
    return own


def _histc(values: torch.Tensor, bins: int = 100, min: float = 0, max: float = 0) -> torch.Tensor:
    count("histc")
    return to_device(torch.histc(alias(values).float(), bins, min, max).to(values.dtype))


def _matmul_backward(
    grad: torch.Tensor, left: torch.Tensor, right: torch.Tensor, mask: list[bool]
) -> tuple[torch.Tensor | None, ...]:
    count("matmul_backward")
    found = matmul_gradients(alias(grad), alias(left), alias(right), mask)
    return tuple(map(to_device, found))
